"""What applies a plan: rewrite, verify, repair, and the report of what was done."""
