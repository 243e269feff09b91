"""The three routes: each against its definition by hand, attention = kv, invariant 3, refusals; the leak probe."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from st_btok import BTokLoss
from st_btok.model_parts import find_btoks, unwrap
from st_btok.pooling import select_btoks
from st_btok.training import routes as routes_module
from st_btok.training.mask import INPUT, TARGET, condensation_attention
from st_btok.training.routes import ROUTES, Call, find_leak
from st_btok.training.splitting import Part
from st_btok.training.targets import join_targets
from tests.backbones import inputs


def case(model, family):
    """Features of every modality, and a target for all rows but the second."""
    samples = inputs(family)[:-1]
    texts = [words_of(model, f"target number {i} " + "x" * i) for i in range(len(samples))]
    texts[1] = texts[1][:0]
    return model.preprocess(samples), texts


def words_of(model, text):
    """Ids of a text alone: to bare text the tokenizer of a text-only model adds the BToks."""
    return torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def run(model, features, targets, route, head=None):
    """What a part embeds to on a route, and its output features."""
    transformer, ids = find_btoks(model)
    outputs = []
    handle = model[-1].register_forward_hook(lambda module, args, output: outputs.append(dict(output)))
    call = Call(model, transformer, ids, lambda part: join_targets(part.features, part.targets, ids), head)
    try:
        found = ROUTES[route](call, Part(dict(features), targets))
    finally:
        handle.remove()
    return found, outputs[0]


def only(targets, row):
    """The targets of one row, and nothing for the others."""
    return [target if number == row else target[:0] for number, target in enumerate(targets)]


def routes(model):
    """What a backbone can run, by the loss' own measurement."""
    own = BTokLoss(model).route
    return ("attention", "kv", "prefix") if own == "attention" else ("prefix",)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_is_the_masked_likelihood_of_the_target(model, family, side):
    """Independent truth: logits of the bare backbone, one text row at a time, under an explicit 4-D mask."""
    if "attention" not in routes(model):
        return
    model.tokenizer.padding_side = side
    features, targets = case(model, family)
    transformer, ids = find_btoks(model)
    batch = join_targets(features, targets, ids)
    head = transformer.model.get_input_embeddings().weight
    decoder = transformer.model.get_decoder()
    for row in (0, 2):  # text rows; rows with media have no position ids under a 4-D mask
        tokens = batch.features["input_ids"][row][batch.features["attention_mask"][row].bool()]
        roles = batch.segments[row][: len(tokens)]
        allowed = torch.ones(len(tokens), len(tokens)).tril().bool()
        window = getattr(decoder.config, "sliding_window", None) or len(tokens)
        allowed &= ~((roles == TARGET)[:, None] & (roles == INPUT)[None])
        near = allowed & torch.ones_like(allowed).triu(1 - window).bool()
        kinds = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
        masks = {"full_attention": allowed[None, None], "sliding_attention": near[None, None]}
        mask = {kind: masks[kind] for kind in kinds} if len(kinds) > 1 or kinds == {"sliding_attention"} else None
        if mask is None:
            mask = (near if window < len(tokens) else allowed)[None, None]
        elif len(kinds) == 1:
            mask = near[None, None]
        with torch.no_grad():
            embedded = transformer.model.get_input_embeddings()(tokens[None])
            states = decoder(
                inputs_embeds=embedded, attention_mask=mask, position_ids=torch.arange(len(tokens))[None]
            ).last_hidden_state[0]
        first = int((roles == TARGET).nonzero()[0])
        expected = F.cross_entropy(states[first - 1 : -1] @ head.T, tokens[first:], reduction="sum")
        with torch.no_grad():
            found, _ = run(model, features, only(targets, row), "attention")
        assert found.tokens == len(targets[row])
        torch.testing.assert_close(found.nll, expected, atol=1e-4, rtol=1e-5)


def test_kv_equals_attention(model, family):
    """Value and every gradient, images and videos included."""
    if family in ("qwen3_5", "mamba"):
        with pytest.raises(ValueError, match='Use route="prefix"|kv route'):
            BTokLoss(model, route="kv")
        return
    if "attention" not in routes(model):  # Gemma 2: eager attention only, so there is nothing to compare with
        return
    features, targets = case(model, family)
    found = {}
    for route in ("attention", "kv"):
        model.zero_grad()
        nll = run(model, features, targets, route)[0].nll
        nll.backward()
        found[route] = nll.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["kv"][0], found["attention"][0], atol=1e-4, rtol=1e-5)
    assert found["attention"][0] > 1
    wanted = found["attention"][1]
    for name, grad in found["kv"][1].items():
        scale = max(1.0, wanted[name].abs().max().item())
        torch.testing.assert_close(grad / scale, wanted[name] / scale, atol=1e-5, rtol=0)


def test_prefix_is_the_likelihood_behind_a_soft_prompt(model, family):
    """Independent truth: one row at a time, the K pooled states as the first inputs of the bare language model."""
    features, targets = case(model, family)
    transformer, ids = find_btoks(model)
    embed = transformer.model.get_input_embeddings()
    with torch.no_grad():
        _, output = run(model, features, targets, "prefix")
        states = select_btoks(output["token_embeddings"], output["input_ids"], output["attention_mask"], ids)
        for row, target in enumerate(targets):
            if not len(target):
                continue
            prompt = torch.cat([states[row], embed(target)])[None]
            read = transformer.model.get_decoder()(inputs_embeds=prompt, use_cache=False).last_hidden_state[0]
            logits = read[len(ids) - 1 : -1] @ embed.weight.T
            expected = F.cross_entropy(logits, target, reduction="sum")
            found, _ = run(model, features, only(targets, row), "prefix")
            torch.testing.assert_close(found.nll, expected, atol=1e-3, rtol=1e-4)


def test_embedding_with_a_target_is_the_embedding_without(model, family):
    """Invariant 3, for every route."""
    features, targets = case(model, family)
    with torch.no_grad():
        plain = model(dict(features))
        for route in routes(model):
            found, output = run(model, features, targets, route)
            torch.testing.assert_close(found.embedding, plain["sentence_embedding"], atol=1e-5, rtol=0)
            assert output["token_embeddings"].shape == plain["token_embeddings"].shape
        again = model(dict(features))
    assert again.keys() == plain.keys() and "past_key_values" not in again, "the hooks are gone"


def test_the_prefix_gradient_passes_through_the_pooled_states_only(model, family):
    """With the pooled states held constant, no gradient of the prefix route reaches the input."""
    features, targets = case(model, family)
    transformer, _ = find_btoks(model)
    handle = transformer.register_forward_hook(
        lambda module, args, output: {**output, "token_embeddings": output["token_embeddings"].detach()}
    )
    seen = []
    watch = transformer.model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    try:
        run(model, features, targets, "prefix")[0].nll.backward()
    finally:
        handle.remove()
        watch.remove()
    assert seen[0].grad is None and seen[-1].grad is not None, "only the target's own embeddings get a gradient"


def test_auto_names_its_choice_and_the_reason(qwen, caplog):
    with caplog.at_level("INFO"):
        loss = BTokLoss(qwen)
    assert loss.route == "attention" and loss.leak == 0.0
    assert "route='attention'" in caplog.text and "leak probe is 0" in caplog.text
    loss([qwen.preprocess(["a", "b"]), qwen.preprocess(["c", "d"])])
    assert loss.measured.leak == 0


def test_auto_uses_kv_where_attention_takes_no_mask(qwen, monkeypatch):
    """Flash attention itself needs a GPU; its name in the config is what decides."""
    config = qwen[0].model.config.get_text_config(decoder=True)
    probe = BTokLoss(qwen).leak
    monkeypatch.setattr("st_btok.training.routes.find_leak", lambda *args: probe)
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    assert BTokLoss(qwen).route == "kv"
    assert BTokLoss(qwen, route="attention").route == "attention"
    qwen[0].model.gradient_checkpointing_enable()
    assert BTokLoss(qwen).route == "attention", "checkpointing leaves no cache"


def test_kv_under_gradient_checkpointing_is_an_error(qwen):
    loss = BTokLoss(qwen, route="kv")
    qwen[0].model.gradient_checkpointing_enable({"use_reentrant": False})
    qwen.train()
    with pytest.raises(ValueError, match='gradient checkpointing.*Use route="attention"'):
        loss([qwen.preprocess(["a", "b"]), qwen.preprocess(["c", "d"])])
    assert unwrap(qwen) is qwen and not qwen[0]._forward_hooks, "no hook is left behind"


def test_rows_without_target_cost_nothing(qwen):
    """kv and prefix read rows with a target only; a batch without any is an ordinary pass."""
    sizes = []
    decoder = qwen[0].model.get_decoder()
    handle = decoder.register_forward_hook(
        lambda m, args, kwargs, out: sizes.append(out[0].shape[:2]), with_kwargs=True
    )
    features = qwen.preprocess(["a", "b", "c"])
    target = [torch.tensor([5, 6, 7]), torch.tensor([], dtype=torch.long), torch.tensor([], dtype=torch.long)]
    run(qwen, features, target, "prefix")
    assert [size[0] for size in sizes] == [3, 1] and sizes[1][1] == 4 + 3 - 1
    sizes.clear()
    run(qwen, features, target, "kv")
    assert [size[0] for size in sizes] == [3, 1] and sizes[1][1] == 3 - 1
    sizes.clear()
    BTokLoss(qwen)([qwen.preprocess([""]), qwen.preprocess([""])])
    probe = len(sizes) - 2
    width = qwen.preprocess([""])["input_ids"].shape[1]
    assert [size[1] for size in sizes[probe:]] == [width, width], "no target, no longer row"
    handle.remove()


def test_unknown_routes_are_refused(qwen):
    with pytest.raises(ValueError, match="route must be one of"):
        BTokLoss(qwen, route="soft")


# --- the leak probe (invariant 4) ------------------------------------------------------------------------------------


def joint(model, family):
    """Joint rows of every modality that a family takes."""
    samples = inputs(family)[:-1]
    texts = [
        torch.tensor(model.tokenizer(f"target number {i}", add_special_tokens=False)["input_ids"])
        for i in range(len(samples))
    ]
    return join_targets(model.preprocess(samples), texts, find_btoks(model)[1])


def masks(model):
    """Whether the attention route is for this backbone."""
    return BTokLoss(model).route == "attention"


def test_the_mask_leaves_no_path_but_the_btoks(model, family, monkeypatch):
    """Invariant 4, exactly 0, for text and pixels; and the probe sees a leak where the mask is off."""
    if not masks(model):
        with pytest.raises(ValueError, match="Use route="):
            BTokLoss(model, route="attention")
        return
    batch = joint(model, family)
    transformer, _ = find_btoks(model)
    assert find_leak(transformer, batch) == 0.0
    monkeypatch.setattr(routes_module, "condensation_attention", lambda *args: nullcontext())
    assert find_leak(transformer, batch) > 0.0, "without the mask the probe must see the input"
    ids = transformer.model.get_input_embeddings()
    assert ids.weight.grad is None, "the probe leaves no gradients"


def test_gradients_reach_the_target_through_the_btoks_only(model, family):
    """Finite differences: moving a BTok row moves the target's likelihood, also with the input cut off."""
    if not masks(model):
        return
    batch = joint(model, family)
    transformer, ids = find_btoks(model)
    rows = transformer.model.get_input_embeddings().weight

    def target_states():
        with torch.no_grad(), condensation_attention(transformer.model, batch.segments):
            return transformer(dict(batch.features))["token_embeddings"][batch.segments == TARGET]

    before = target_states()
    with torch.no_grad():
        rows[ids] += 0.1
    assert (target_states() - before).abs().max() > 1e-3
