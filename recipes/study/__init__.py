"""Evidence: every part of the method against its controls, on real pairs, at equal steps and at equal time.

Read `variants` (what is compared), `runs` (one run), `study` (their order), `report` (the tables). `results/study.md`
is what `results/runs.jsonl` and `costs.jsonl` give: runs inside the chat template. Of the older runs without it only
the tables are left, `results/bare_text.md`; commit 3d6e28e holds their lines.
"""
