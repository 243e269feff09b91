"""Save a model that engines serve, and compare a server with it: `python recipes/examples/serving.py [URL]`.

Start the server between the two steps: `vllm serve served --runner pooling --port 8000`, then give its URL.
"""

import json
import sys
import urllib.request

import numpy as np
from sentence_transformers import SentenceTransformer

from st_btok import build_model

# 1. `readout="last"` is plain last-token pooling in the saved model, which engines know
model = build_model("Qwen/Qwen2-VL-2B-Instruct", readout="last", max_seq_length=256)
model.save_pretrained("served")
model = SentenceTransformer("served")

# 2. A request: `messages`, so that the server's chat template appends the BToks
if len(sys.argv) > 1:
    text = "a kite over the sea"
    body = {"model": "served", "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]}
    request = urllib.request.Request(
        f"{sys.argv[1]}/v1/embeddings", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        served = np.array(json.load(answer)["data"][0]["embedding"])
    print("cosine to sentence-transformers:", float(served @ model.encode(text)))
