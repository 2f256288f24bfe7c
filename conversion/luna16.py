"""LUNA16 to crops around its nodule candidates, with labels and what FROC needs.

    python -m conversion.luna16 --source LUNA16 --candidates candidates.csv --annotations annotations.csv \
        --excluded annotations_excluded.csv --dest Training_Data/LUNA16_crops

source: the folder with the .mhd files (subset0 ... subset9). Writes a prepared tree:

    <dest>/<series>/<line>.npy   int16 HU (height, width, slices), a cube of crop_mm around the candidate in this line of
                                 candidates.csv (the header is line 1); air (-1000) outside the scan
    <dest>/labels.csv            case,label,patient,series,nodule,test_only: a line per candidate
    <dest>/nodules.csv           series,nodule: a line per annotated nodule of the scans, found by a candidate or not
    <dest>/dataset.yaml          modality, window, slice_axis, spacing_mm, source and how the crops were cut

labels.csv: case is <series>/<line>. label is `nodule` or `no nodule`. patient is the series: LIDC has a scan of each.
nodule is the number, in nodules.csv, of the annotated nodule in whose sphere the candidate lies (the nearest of
several), `excluded` for one that lies in an excluded finding only and counts neither way, and empty for a false
positive. test_only is 1 for negatives beyond `negatives` per scan: leave them out of training and validation; a test
takes all. nodules.csv: numbers count from 0 over all scans. A nodule without a candidate is missed, whatever the scores.
"""
