"""The training run: compiled steps, optimizers, schedules, reports, devices and ranks."""
