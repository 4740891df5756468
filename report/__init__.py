"""What a result is worth: scoring, baselines, intervals, leakage check, audit, comparison of runs, and the page.

scoring.py decides whether an answer is right: read it. The rest computes and shows figures of answers that are there
already, changes none of them, and may be trusted unread.
"""
