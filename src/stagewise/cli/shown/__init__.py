"""Commands that need no model.

1. `report_command` shows what a run wrote.
2. `schedules_command` draws all schedules side by side.
"""
