"""Find the page that answers a question: `python recipes/examples/pages_of_a_pdf.py`.

Needs `pip install pypdfium2`. Every page is drawn and embedded as a picture, so tables and figures count.
"""

from sentence_transformers import SentenceTransformer

from st_btok import encode_checked, pdf_pages

# 1. A trained model; an untrained one finds little
model = SentenceTransformer("btok-vdr")

# 2. Pages become rows one by one; a page that can't be drawn is skipped with its reason
result = encode_checked(model, pdf_pages("report.pdf"), on_error="skip")
for skipped in result.skipped:
    print("left out:", skipped)

# 3. The three nearest pages; `result.rows` says which row of the input each vector belongs to
query = model.encode_query("how much did revenue grow?")
similarities = model.similarity(query, result.embeddings)[0]
for place in similarities.argsort(descending=True)[:3].tolist():
    print(f"page {result.rows[place] + 1}: {similarities[place]:.3f}")
