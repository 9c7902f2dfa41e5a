"""The papers' claims as cells: what each is trained on, how it is judged, and what is compared with what.

cell.py says what a cell is; fvdm, tic_ft, lct, aid and fca list theirs; data, make and score do what they share;
runner.py trains and judges one cell with one seed into one file; table.py makes the table of such files.
"""
