"""What every stage needs and none owns: tables, files, progress, checks of plain values."""
