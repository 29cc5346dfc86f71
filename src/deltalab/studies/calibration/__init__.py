"""How often the verdicts are wrong, measured: random groups in the safety group's place, in real trainings.

    python -m deltalab.studies.calibration FOLDER

`geometry` tunes the bundled organism with many seeds, once, and adds up what random groups moved and scored in each;
`simulate` draws studies from that and counts claims; `__main__` runs both and writes the tables.
"""
