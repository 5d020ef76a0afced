"""Commands that show what is there, without a model.

1. `report_command`: what a run wrote.
2. `schedules_command`: all schedules beside each other.
"""
