"""From files to examples, tokens and media: layouts, question types, images, sound, volumes, videos, the data check.

task.py says what a script must give (Task); data_check.py and contract.py stand above the rooms, everything else here
imports common and report.scoring alone.
"""
