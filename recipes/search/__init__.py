"""From a folder of files to a search page: `python -m recipes.search index | query | serve`.

Read in this order: `__main__` and `commands` (flags, and what they start), `folder` (files become items), `index`
(items become rows, only those that changed), `store` and `qdrant_store` (where rows live), `page` and `page_html`
(what a person sees).

Rule: imports public names of `st_btok`, the fingerprint of `evaluation`, tables of `recipes.data`, and its own files.
Works with any SentenceTransformer, BTok or not.
"""
