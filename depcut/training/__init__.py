"""Getting the accuracy back: schedules, rewinding, scratch controls, distillation, a loop."""
