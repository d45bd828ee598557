"""What inspect shows is what is there: buckets, costs and level scales against plain counting."""

import csv
import math

import numpy as np
import pytest
import torch

from loglinear.evals import inspection
from loglinear.evals.command import default_text, run_inspect
from loglinear.evals.inspection import (
    buckets_in_use,
    cost_rows,
    cost_table,
    level_scales_on,
    partition,
    partition_text,
    summarize_level_scales,
)
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.ops import reference


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 63, 100])
def test_buckets_are_the_binary_digits_of_the_position(position):
    buckets = partition(position, 12)
    assert [token for _, first, last in buckets for token in range(first, last + 1)] == list(range(position + 1))
    sizes = [last - first + 1 for _, first, last in buckets]
    digits = [2**height for height in range(10) if position // 2**height % 2]
    assert sizes == [*reversed(digits), 1]
    assert [level for level, _, _ in buckets] == [*(int(math.log(size, 2) + 1.5) for size in sizes[:-1]), 0]


def test_the_last_level_takes_everything_older():
    assert partition(13, 3) == [(2, 0, 11), (1, 12, 12), (0, 13, 13)]
    assert partition(5, 1) == [(0, 0, 5)]
    assert partition_text(6, 5) == "token 6 reads level 3: 0–3, level 2: 4–5, level 0: 6"


def test_the_state_grows_with_the_number_of_levels_and_the_cache_with_the_length():
    config = LogLinearConfig.preset("tiny-gated-deltanet")
    lengths = [64, 1024, 4096, 1024 * 1024]  # shorter and longer than what the preset is made for
    rows = cost_rows(config, lengths)
    bucket = 2 * 2 * 16 * 32 * 2  # layers, heads, K, V, bytes
    assert [row.levels for row in rows] == [7, 11, 13, 21]
    assert [row.state_bytes for row in rows] == [7 * bucket, 11 * bucket, 13 * bucket, 21 * bucket]
    assert [row.kv_cache_bytes for row in rows] == [2 * 64 * 2 * 2 * n for n in lengths]
    assert config.num_levels == 9, "the configuration that was asked about must not change"


def test_the_linear_twin_keeps_one_state_at_any_length():
    rows = cost_rows(LogLinearConfig.preset("tiny-gated-deltanet", num_levels=1), [1024, 65536])
    assert [row.levels for row in rows] == [1, 1]
    assert rows[0].state_bytes == rows[1].state_bytes
    header, lines = cost_table(rows)
    assert header[0] == "tokens" and [line[0] for line in lines] == ["1K", "64K"]


def test_level_scales_are_those_of_the_layers():
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet")).eval()
    ids = list(range(50))
    scales = level_scales_on(model, ids)
    assert {layer: values.shape for layer, values in scales.items()} == {0: (50, 2, 9), 1: (50, 2, 9)}
    block = model.model.layers[0]
    seen = []
    hook = block.mixer.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append((inputs, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
        inputs, kwargs = seen[0]
        wanted = block.mixer.level_scales(inputs[0] if inputs else kwargs["x"])[0]
    hook.remove()
    np.testing.assert_allclose(scales[0], wanted.numpy(), rtol=1e-5)
    assert not any(module._forward_hooks for module in model.modules()), "hooks must be taken away"
    with pytest.raises(ValueError, match="at least one token"):
        level_scales_on(model, [])


def test_summaries_look_at_filled_buckets_only():
    values = np.zeros((4, 1, 4), np.float32)
    # Level 1 is filled for the odd tokens 1 and 3, level 2 for tokens 2 and 3, level 3 never, level 0 always.
    values[:, 0, 0], values[1::2, 0, 1], values[2:, 0, 2] = 1.0, (2.0, 4.0), 5.0
    rows = summarize_level_scales({7: values})
    assert [(row.layer, row.level, row.mean, row.tokens) for row in rows] == [
        (7, 0, 1.0, 4),
        (7, 1, 3.0, 2),
        (7, 2, 5.0, 2),
        (7, 3, None, 0),
    ]
    assert (rows[1].smallest, rows[1].largest) == (2.0, 4.0)
    assert inspection.level_scale_table(rows)[1] == [["7", "1.00", "3.00", "5.00", "–"]]


def test_buckets_in_use_agree_with_the_partition():
    in_use = buckets_in_use(40, 7)
    for position in range(40):
        assert set(in_use[position].nonzero()[0]) == {level for level, _, _ in partition(position, 7)}


@pytest.mark.parametrize("mixer", ["mamba2", "gated-deltanet", "kda"])
def test_contributions_are_those_of_the_recurrence(mixer, monkeypatch):
    """Each level's state, read by its query with its λ, from a recurrence of its own over tokens."""
    model = LogLinearForCausalLM(LogLinearConfig.preset(f"tiny-{mixer}", initializer_range=0.3)).double().eval()
    ids = list(range(40))
    layer = model.model.layers[1].mixer
    seen = {}
    layer.register_forward_pre_hook(lambda module, arguments: seen.update(x=arguments[0]))
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
        parts = torch.stack(list(inspection.level_contributions(layer, seen["x"])), 1)  # [T, L, H, V]

        captured = {}

        def recurrent(q, k, v, level_scales, **options):
            options = {name: options[name] for name in ("log_decay", "beta", "scale")}
            controls = {name: None if x is None or name == "scale" else x[0] for name, x in options.items()}
            wanted = []
            for level in range(level_scales.shape[-1]):
                # A level more of values: the recurrence is asked for one state at a time, all λ at one.
                only = torch.zeros_like(level_scales)
                only[..., level] = 1
                o, _ = reference.recurrence(
                    q[0], k[0], v[0], only[0], controls["log_decay"], controls["beta"], options["scale"], None, 0
                )
                wanted.append(level_scales[0, :, :, level, None] * o)
            captured["parts"] = torch.stack(wanted, 1)
            return captured["parts"].sum(1)[None], None

        monkeypatch.setattr("loglinear.layers.recurrent.log_linear_attention", recurrent)
        layer(seen["x"])
    torch.testing.assert_close(parts, captured["parts"], rtol=1e-9, atol=1e-12)
    in_use = torch.from_numpy(buckets_in_use(40, layer.num_levels))
    assert (parts[~in_use] == 0).all() and (parts[in_use].norm(dim=-1) > 0).all()
    assert "finish" not in vars(layer) and not layer.level_scales._forward_hooks


def test_shares_add_up_and_follow_the_scales():
    model = LogLinearForCausalLM(LogLinearConfig.preset("tiny-gated-deltanet", initializer_range=0.3)).eval()
    ids = list(range(100))
    rows = inspection.level_shares_on(model, ids)
    assert len(rows) == 2 * 2 * 9
    for layer in (0, 1):
        for head in (0, 1):
            own = [row for row in rows if (row.layer, row.head) == (layer, head)]
            assert sum(row.share for row in own) == pytest.approx(1)
            assert sum(row.aligned_share for row in own) == pytest.approx(1, abs=1e-5)
            assert (own[8].tokens, own[8].share, own[8].share_when_filled, own[8].mean_scale) == (0, 0.0, None, None)
            assert own[1].share_when_filled == pytest.approx(own[1].share * 100 / own[1].tokens)
    means = {(row.layer, row.head, row.level): row.mean for row in summarize_level_scales(level_scales_on(model, ids))}
    assert all(means[row.layer, row.head, row.level] == pytest.approx(row.mean_scale) for row in rows)
    with torch.no_grad():  # λ of one level at zero: nothing of it is left
        weights = model.model.layers[0].mixer.level_scales
        weights.weight[0, 1] = 0
        weights.forward = lambda x, forward=weights.forward: forward(x) * (weights.weight != 0)
    changed = [row for row in inspection.level_shares_on(model, ids) if (row.layer, row.head) == (0, 0)]
    assert changed[1].share == 0.0 == changed[1].aligned_share
    assert sum(row.share for row in changed) == pytest.approx(1)


def test_shares_by_hand():
    scales = np.ones((4, 1, 3), np.float32)
    # Level 1 is filled for tokens 1 and 3, level 2 for tokens 2 and 3.
    norms = torch.tensor([[1.0, 0, 0], [1, 3, 0], [0, 0, 0], [1, 1, 2]], dtype=torch.float64)[:, None]
    aligned, energy = torch.tensor([[6.0, -1.0, 5.0]]), torch.tensor([10.0])
    rows = inspection._shares(3, scales, norms, aligned, energy)
    # Token 2 has no output on any level, so three tokens count.
    assert [row.share for row in rows] == pytest.approx([(1 + 0.25 + 0.25) / 3, (0.75 + 0.25) / 3, 0.5 / 3])
    assert [row.share_when_filled for row in rows] == pytest.approx([0.5, 0.5, 0.5])
    assert [row.aligned_share for row in rows] == pytest.approx([0.6, -0.1, 0.5])
    assert [row.tokens for row in rows] == [4, 2, 2]
    assert inspection.level_share_table(rows)[1] == [["3", "50.0", "33.3", "16.7"]]


def test_a_preset_is_inspected_without_weights(tmp_path, capsys):
    written = run_inspect("log-linear-mamba2-825m", tmp_path, lengths=[16384])
    assert sorted(path.name for path in written) == ["memory.png", "partition.png"]
    shown = capsys.readouterr().out
    assert "825,465,312" in shown and "16K" in shown and "237 MiB" in shown


def test_level_scales_of_a_preset_are_shown_on_a_given_text(tmp_path, capsys):
    run_inspect("tiny-mamba2", tmp_path, text=default_text()[:100], device="cpu")
    assert "random ones" in " ".join(capsys.readouterr().out.split())
    with (tmp_path / "level_scales.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["layer", "head", "level", "mean", "smallest", "largest", "tokens"]
    assert len(rows) == 2 * 4 * 9
    by_level = {row["level"]: row for row in rows}
    assert by_level["8"]["mean"] == "" and by_level["0"]["tokens"] == "101"
    assert (tmp_path / "level_scales.png").is_file() and (tmp_path / "level_shares.png").is_file()
    with (tmp_path / "level_shares.csv").open() as file:
        shares = list(csv.DictReader(file))
    assert len(shares) == 2 * 4 * 9 and sum(float(row["share"]) for row in shares) == pytest.approx(8, abs=1e-3)


def test_plain_mixers_have_no_partition(tmp_path):
    written = run_inspect("tiny-attention", tmp_path)
    assert [path.name for path in written] == ["memory.png"]


@pytest.mark.parametrize("option", [{"text": "a text"}, {"most_tokens": 8}, {"device": "cpu"}])
@pytest.mark.parametrize(
    ("model", "reason"),
    [("gated-deltanet-793m", "with one level .num_levels=1. its mixer is the plain linear one"),
     ("tiny-attention", "it is a softmax model")],
)  # fmt: skip
def test_options_of_level_scales_are_refused_for_models_without_them(tmp_path, model, reason, option):
    (name,) = option
    shown = {"most_tokens": "max-tokens"}.get(name, name)
    with pytest.raises(ValueError, match=f"got {shown}, but {model} has no level scales to show: {reason}"):
        run_inspect(model, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_a_preset_without_a_text_computes_nothing_on_a_device(tmp_path):
    with pytest.raises(ValueError, match="got max-tokens, device, but the preset tiny-mamba2 has no trained weights"):
        run_inspect("tiny-mamba2", tmp_path / "out", most_tokens=8, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_hybrid_of_attention_alone_has_no_level_scales(tmp_path):
    config = LogLinearConfig.preset("tiny-gated-deltanet", attention_layers=[0, 1])
    config.save_pretrained(tmp_path / "model")
    written = run_inspect(str(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in written] == ["memory.png"]
    with pytest.raises(ValueError, match="got text, but .*it is a softmax model"):
        run_inspect(str(tmp_path / "model"), tmp_path / "out", text="a text")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_shown(tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(FileExistsError, match="wanted a folder that is there or can be made"):
        run_inspect("tiny-mamba2", tmp_path / "file")
    assert capsys.readouterr().out == ""


def test_a_name_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nor is 'nothing' a preset"):
        run_inspect("nothing", tmp_path)
