"""Everything that `imgcls_fast.*` offers in Python; the command line calls the same functions.

Data may be a folder, a CSV or JSONL table, a zip or tar; a run may be its path, its name in the folder of runs, a Run,
or None for the last finished one. Heavy libraries are imported when a function is called. The files have the names of those in `cli/`.
"""
