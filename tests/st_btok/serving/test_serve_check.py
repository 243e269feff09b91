import json
import re
from pathlib import Path

import numpy as np
import pytest

from st_btok.serving import serve_check as tool
from st_btok.serving.serve_check import RIGHT, TOKEN_STATES, serve_check, serves, summary
from tests.backbones import picture
from tests.fake_engine import serving

PAGE = Path(__file__).parents[3] / "docs" / "serve.md"

LIMIT = 200  # tokens: the long text stays short


def verdicts(answers, form):
    return {answer.row: answer.verdict for answer in answers if answer.form == form}


@pytest.fixture
def last(btok_model):
    return btok_model("qwen2_vl", readout="last", max_seq_length=LIMIT)


@pytest.fixture
def mean(btok_model):
    return btok_model("qwen2_vl", max_seq_length=LIMIT)


def test_last_state_is_right_through_messages_and_wrong_through_input(last):
    with serving(last) as url:
        answers = serve_check(url, last)
    assert serves(answers)
    right = verdicts(answers, RIGHT)
    assert right.pop("long text") == "refused"
    assert set(right.values()) == {"equal"} and {"text", "image", "image and text"} <= right.keys()
    assert verdicts(answers, "input")["text"] == "WRONG"
    assert "image" not in verdicts(answers, "input")
    assert verdicts(answers, "messages, no limits")["long text"] == "refused"
    shut = verdicts(answers, "messages, add_generation_prompt")
    assert {row for row, verdict in shut.items() if verdict != "equal"} == {"long text"}
    assert verdicts(answers, "messages, truncate_prompt_tokens")["long text"] == "WRONG"
    assert not verdicts(answers, TOKEN_STATES)
    lines = "\n".join(summary(answers))
    assert "it skips the chat template" in lines and "wrong rows: long text" in lines


def test_an_engine_that_averages_all_tokens_is_found(mean):
    with serving(mean, pooling="mean over all") as url:
        answers = serve_check(url, mean)
    assert set(verdicts(answers, RIGHT).values()) == {"WRONG", "refused"}
    states = verdicts(answers, TOKEN_STATES)
    assert {row for row, verdict in states.items() if verdict != "equal"} == {"long text"}
    assert serves(answers)  # there is one right form: the states, averaged by the caller


def test_an_engine_of_other_weights_is_found_in_every_form(mean, btok_model):
    other = btok_model("qwen2_vl", max_seq_length=LIMIT, seed=1)
    with serving(other) as url:
        answers = serve_check(url, mean)
    assert not serves(answers)
    assert "equal" not in {answer.verdict for answer in answers}


def test_a_refused_form_is_no_wrong_form(mean):
    with serving(mean, plugin=True) as url:
        answers = serve_check(url, mean)
    assert set(verdicts(answers, "input").values()) == {"refused"}
    assert serves(answers)


def test_command_line_names_the_wrong_form(last, tmp_path, capsys):
    last.save_pretrained(str(tmp_path / "model"))
    with serving(last) as url:
        status = tool.main(url + "/v1", str(tmp_path / "model"), None, tool.BOUND, tmp_path / "answers.json")
    assert status == 0
    printed = capsys.readouterr().out
    assert "WRONG    input" in printed and printed.endswith("served as sentence-transformers does\n")
    assert {answer["form"] for answer in json.loads((tmp_path / "answers.json").read_text())} >= {RIGHT, "input"}


def test_no_server(mean):
    with pytest.raises(ConnectionError, match="Start it first"):
        serve_check("http://127.0.0.1:9", mean)


def test_the_lines_in_the_docs_send_the_right_form(last, mean):
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, "docs/serve.md", "exec"), names)
    image = picture(56, 84)
    rows = [{"text": "a kite"}, {"text": "a red kite " * 10}, {"image": image}, {"image": image, "text": "what?"}]
    for model, pooling in ((last, "as saved"), (mean, "as saved"), (mean, "mean over all")):
        limits = model[0].processing_kwargs["chat_template"]
        expected = model.encode([row["text"] if "image" not in row else row for row in rows], batch_size=1)
        with serving(model, pooling=pooling) as url:
            for row, vector in zip(rows, expected, strict=True):
                if pooling == "as saved":
                    found = names["ask"](url, "/v1/embeddings", limits, **row)["embedding"]
                else:
                    found = names["ask_mean"](url, limits, **row)
                assert np.abs(np.array(found) - vector).max() <= 1e-5
