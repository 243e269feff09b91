"""What a user runs: quickstart, train, compare, encode a corpus, search; and behind it the rooms that do the work.

A command is a light file with its flags; the room that it names does the work and is imported afterwards. `bench`,
`research` and `study` are what maintainers run.

Size: 11,726 lines (`find recipes -name '*.py' | xargs cat | wc -l`, 29 November 2026), where 7,000 were
planned. The search page (1,600), the study (1,200), a model that sees (900) and the readers of tables and
corpora in `data`, which say what is wrong in which line, came after the plan or grew by what users met.
"""
