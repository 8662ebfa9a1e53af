# SPDX-License-Identifier: Apache-2.0
"""The preset `docsum` on a few files and a model of one layer: every step of the way."""

import itertools
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from klq.config import KLQConfig
from klq.logging import read_jsonl
from klq.presets import docstrings, docsum, docsum_sft, load_preset
from klq.presets.docsum_sft import ASK, Size, make_rows, prepare, train_tokenizer
from klq.presets.rouge import chrf, lcs_length, rouge_l

TINY = Size(
    pairs=1000,
    vocabulary=400,
    prompt_tokens=24,
    completion_tokens=12,
    layers=1,
    width=32,
    heads=2,
    sft_steps=3,
    sft_batch=8,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


NOUNS = ("matrix", "socket", "parser", "kernel", "buffer", "thread", "module", "number")
VERBS = ("Return", "Create", "Delete", "Update", "Compare", "Convert")


def spell(number: int) -> str:
    """A word of letters that is different for every number: digits do not tell docstrings apart."""
    return "".join("abcdefghij"[int(digit)] for digit in f"{number:04d}")


def docstring(number: int) -> str:
    verb, noun = VERBS[number % len(VERBS)], NOUNS[number % len(NOUNS)]
    details = f"The {spell(number)} detail of {noun} is long."
    return f"{verb} the {noun} {spell(number)}.\n\n    {details}\n    "


def write_file(path: Path, docstrings_: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings_)]
    path.write_text("raise ImportError('this file must never be imported')\n" + "\n".join(parts))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for file in range(40):
        write_file(
            root / f"package{file % 5}" / f"m{file}.py",
            [docstring(10 * file + i) for i in range(6)],
        )
    return root


@pytest.fixture(scope="session")
def material(corpus, tmp_path_factory):
    return prepare(TINY, cache=tmp_path_factory.mktemp("cache"), roots=[corpus], device=CPU)


# ---- ROUGE-L and chrF --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "truth", "expected"),
    [
        ("Return the index.", "return THE index", 1.0),
        ("a b c d", "a c", 2 * 2 / 6),
        ("a b c d", "d c b a", 2 * 1 / 8),  # order counts: one word in common order
        ("the cat sat on the mat", "the cat was on a mat", 2 * 4 / 12),
        ("x y", "z", 0.0),
        ("", "a", 0.0),
        ("...", "a", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_by_hand(candidate, truth, expected):
    assert rouge_l(candidate, truth) == pytest.approx(expected, abs=1e-12)


def test_lcs_against_enumeration():
    numbers = random.Random(0)
    for _ in range(200):
        a, b = (["pqr"[numbers.randrange(3)] for _ in range(numbers.randrange(8))] for _ in "ab")
        common = {c for n in range(len(a) + 1) for c in itertools.combinations(a, n)}
        common &= {c for n in range(len(b) + 1) for c in itertools.combinations(b, n)}
        assert lcs_length(a, b) == lcs_length(b, a) == max(map(len, common))


def test_rouge_l_properties():
    numbers = random.Random(1)
    for _ in range(200):
        a, b = (" ".join(numbers.choices("pqrs", k=numbers.randrange(1, 9))) for _ in "ab")
        score = rouge_l(a, b)
        assert 0 <= score <= 1 and score == rouge_l(b, a)
        assert (score == 1) == (a == b)
        assert rouge_l(a, a) == 1
        # A word that the truth lacks can only cost: padding an answer is no way to a reward.
        assert rouge_l(a + " other", b) <= score


def test_chrf_by_hand():
    assert chrf("Return the index.", "Return the index.") == pytest.approx(1)
    assert chrf("abc", "xyz") == chrf("", "abc") == 0
    # 1-grams: 2 of 3 both ways; 2-grams: 1 of 2; 3-grams: 0 of 1. F of the equal means is the mean.
    assert chrf("abc", "abd") == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # n = 1 only; precision 1, recall 1/3, F2 = 5PR / (4P + R).
    assert chrf("a", "abc") == pytest.approx(5 / 3 / (4 + 1 / 3))


# ---- corpus ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sum it all.\n\nIt adds\n  all the numbers.", ("Sum it all.", "It adds all the numbers.")),
        ("No full stop\n\nBut a blank line after.", ("No full stop", "But a blank line after.")),
        ("A line that goes on\nin the next one, so it is not whole.", None),
        ("Two words.\n\nThe details are long enough for this.", None),
        ("Only a summary line.", None),
        ("Return the sum.\n\nToo short.", None),
        ("Return the sum.\n\nIt says: return the sum. So it gives itself away.", None),
        ("Return the ∑.\n\nThis has a letter that is not ASCII in it.", None),
        (">>> example one two\n\nThis begins with markup, not with a word.", None),
        ("f(x, y) -> (1, 2), 3.4 [5]\n\nThis is a signature, mostly not letters.", None),
    ],
)  # fmt: skip
def test_split_docstring(text, expected):
    assert docstrings.split_docstring(text) == expected


def test_files_are_parsed_never_imported_and_bad_ones_left_out(tmp_path):
    good = docstring(1)
    write_file(tmp_path / "good.py", [good])
    write_file(tmp_path / "tests" / "skipped.py", [docstring(2)])
    (tmp_path / "syntax.py").write_text("def broken(:\n")
    (tmp_path / "bytes.py").write_bytes(b"\xff\xfe\x00 not text")
    (tmp_path / "zero.py").write_bytes(b"x = 1\0")
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "deep.py").write_text("(" * 5000 + ")" * 5000)
    nested = (
        f'class A:\n    if True:\n        async def g(self):\n            """{docstring(3)}"""\n'
    )
    (tmp_path / "nested.py").write_text(nested)
    files = docstrings.python_files([tmp_path])
    assert len(docstrings.fingerprint(files)) == 64
    pairs = docstrings.read_pairs(files, limit=100)
    assert sorted(p.name for p in pairs) == ["f0", "g"]


def test_no_text_on_both_sides(tmp_path):
    """The same docstring in many files, in part with other details, digits or case, counts once."""
    same, details = "Return the shared thing.", "These details are shared by all of the files, " * 2
    for file in range(60):
        variants = [
            f"{same}\n\n    Details of file {spell(file)} stand here alone.\n    ",
            f"Summary of file {spell(file)} alone.\n\n    {details} {spell(file)}\n    ",
            f"Return {file} the SHARED, thing\n\n    Other {spell(file)} details are here.\n    ",
        ]
        write_file(tmp_path / f"m{file}.py", [*variants, docstring(file)])
    files = docstrings.python_files([tmp_path])
    pairs = docstrings.read_pairs(files, limit=10**6)
    sides = {relative: docstrings.held_out(relative) for relative, _ in files}
    assert 0 < sum(sides.values()) < 30
    letters = [
        ["".join(filter(str.isalpha, t.lower())) for t in (p.summary, p.body)] for p in pairs
    ]
    for column, length in ((0, None), (1, 64)):
        texts = [row[column][:length] for row in letters]
        assert len(set(texts)) == len(texts)
    assert sum("shared" in p.summary.lower() for p in pairs) == 1
    assert sum(details in p.body for p in pairs) == 1
    # Which side a file is on hangs on its path alone, not on what else is installed.
    for path in random.Random(0).sample(sorted(tmp_path.glob("*.py")), 30):
        path.unlink()
    assert all(docstrings.held_out(r) == sides[r] for r, _ in docstrings.python_files([tmp_path]))


def test_limit_is_an_even_sample(corpus):
    files = docstrings.python_files([corpus])
    everything = docstrings.read_pairs(files, limit=10**6)
    some = docstrings.read_pairs(files, limit=50)
    assert some == everything[:50]
    assert len({p.body.split()[4] for p in some}) > 4  # not the first package only


def test_rows_fit_and_round_trip(corpus):
    pairs = docstrings.read_pairs(docstrings.python_files([corpus]), limit=1000)
    tokenizer = train_tokenizer([p.body for p in pairs], TINY.vocabulary)
    assert len(tokenizer) <= TINY.vocabulary
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    rows = make_rows(pairs, tokenizer, TINY)
    assert rows and make_rows([], tokenizer, TINY) == []
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert len(ids) <= TINY.prompt_tokens and tokenizer.decode(ids[-1:]) == ASK
        assert tokenizer.pad_token_id not in ids and tokenizer.eos_token_id not in ids
        assert len(tokenizer(row["summary"])["input_ids"]) < TINY.completion_tokens
        assert tokenizer.decode(tokenizer(row["summary"])["input_ids"]) == row["summary"]


# ---- cache -------------------------------------------------------------------------------------


def test_cache_is_used_and_keyed(corpus, tmp_path, monkeypatch):
    first = prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    with monkeypatch.context() as patch:
        patch.setattr(docsum_sft, "train_sft", lambda *a: pytest.fail("the cache was not used"))
        again = prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    assert (again.train, again.held_out) == (first.train, first.held_out)
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    pairs = zip(first.model.state_dict().items(), again.model.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    ids = torch.tensor([first.tokenizer(first.train[0]["prompt"])["input_ids"]])
    assert torch.equal(first.model(ids).logits, again.model(ids).logits)

    prepare(replace(TINY, seed=1), cache=tmp_path, roots=[corpus], device=CPU)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("when", ["train_sft", "make_rows"])
def test_half_written_cache_is_never_picked_up(corpus, tmp_path, monkeypatch, when):
    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(docsum_sft, when, stop)
        prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    assert list(tmp_path.iterdir()) == []

    # What a killed process leaves: a temporary directory, with everything in it but one file.
    whole = prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    (place,) = tmp_path.iterdir()
    os.rename(place, tmp_path / f".tmp-{place.name}-killed")
    (tmp_path / f".tmp-{place.name}-killed" / "rows.json").unlink()
    again = prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    assert place.is_dir() and again.train == whole.train


def test_a_race_for_the_cache_has_one_winner(corpus, tmp_path, monkeypatch):
    honest = docsum_sft._make

    def make_while_another_finishes(place, *arguments):
        honest(place, *arguments)
        with monkeypatch.context() as patch:
            patch.setattr(docsum_sft, "_make", honest)
            prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)

    monkeypatch.setattr(docsum_sft, "_make", make_while_another_finishes)
    material = prepare(TINY, cache=tmp_path, roots=[corpus], device=CPU)
    assert material.train and len(list(tmp_path.iterdir())) == 1


def test_too_small_a_corpus_is_one_clear_error(tmp_path):
    write_file(tmp_path / "roots" / "m.py", [docstring(0)])
    with pytest.raises(ValueError, match="docsum found only"):
        prepare(TINY, cache=tmp_path / "cache", roots=[tmp_path / "roots"], device=CPU)
    assert list((tmp_path / "cache").iterdir()) == []


# ---- measuring ---------------------------------------------------------------------------------


def test_measure_of_the_reference_itself(material):
    outcome = docsum.measure(
        material.model,
        material.model,
        material.tokenizer,
        material.held_out,
        max_tokens=12,
        samples=2,
    )
    assert outcome.kl.abs().max() == 0
    assert outcome.length.min() >= 1 and outcome.length.max() <= 12
    assert len(outcome.texts) == len(outcome.rouge_l) == len(material.held_out)


def test_kl_of_a_temperature_and_of_greedy(material):
    """Greedy is a distribution on one answer: its KL is minus the answer's log-probability."""
    model, tokenizer, rows = material.model, material.tokenizer, material.held_out[:4]
    several = [
        docsum.measure(model, model, tokenizer, rows, max_tokens=12, temperature=t).kl.sum()
        for t in (1.0, 0.7, docsum.GREEDY)
    ]
    assert several[0] < several[1] < several[2]
    outcome = docsum.measure(
        model, model, tokenizer, rows, max_tokens=12, temperature=docsum.GREEDY
    )
    for row, kl, length in zip(rows, outcome.kl, outcome.length, strict=True):
        ids = tokenizer(row["prompt"])["input_ids"]
        total = 0.0
        for _ in range(int(length)):
            logprobs = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            total -= logprobs.max().item()
            ids.append(int(logprobs.argmax()))
        assert kl == pytest.approx(total, rel=1e-3)


def test_every_chunk_has_its_own_random_numbers(material, monkeypatch):
    """Whatever the policy did before, a chunk meets the same numbers."""
    state, generate = [], docsum.HFRollout.generate

    def watched(self, ids):
        state.append(torch.initial_seed())
        return generate(self, ids)

    monkeypatch.setattr(docsum.HFRollout, "generate", watched)
    model, rows = material.model, material.held_out[:6]
    docsum.measure(model, model, material.tokenizer, rows, max_tokens=4, samples=2, chunk=3)
    assert len(set(state)) == 4


def test_paired():
    mean, se = docsum.paired(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert mean == pytest.approx(1) and se == pytest.approx(1 / 3**0.5)


# ---- the whole path ----------------------------------------------------------------------------


def test_whole_path(corpus, tmp_path, monkeypatch, capsys):
    from klq.trainer import KLQTrainer

    # Long enough that it sometimes matches a word, so that the reward is not always zero.
    monkeypatch.setitem(docsum.SIZES, "cpu", replace(TINY, sft_steps=60))
    monkeypatch.setattr(docstrings, "default_roots", lambda: [corpus])
    monkeypatch.setenv("KLQ_CACHE", str(tmp_path / "cache"))
    preset = load_preset(
        "docsum", output_dir=str(tmp_path / "run"), num_updates=3, value_warmup_updates=1,
        per_device_train_batch_size=8, eval_prompts=16, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = KLQTrainer(args=preset.args, **preset.trainer_kwargs)
    trainer.train()
    shown = []
    measure = docsum.measure

    def watched(policy, sft, tokenizer, rows, **settings):
        shown.extend(row["prompt"] for row in rows)
        return measure(policy, sft, tokenizer, rows, **settings)

    monkeypatch.setattr(docsum, "measure", watched)
    table = preset.report(trainer)
    held_out = {row["prompt"] for row in preset.trainer_kwargs["eval_dataset"]}
    assert len(shown) == 5 * 16 and held_out and not held_out & set(shown)

    assert list(table["policies"]) == ["SFT", "SFT, T = 0.7", "SFT, greedy", "no reward", "KLQ"]
    assert table["prompts"] == 16 and isinstance(table["passed"], bool)
    policies = table["policies"]
    assert policies["SFT"]["kl"] == 0 and policies["SFT"]["minus_sft"] == 0
    assert policies["KLQ"]["kl"] > 0 and policies["no reward"]["kl"] > 0
    assert policies["KLQ"]["rouge_l"] > 0
    for directory, reward in (("run", "rouge_l_reward"), ("run/no-reward", "no_reward")):
        metrics = read_jsonl(tmp_path / directory / "metrics.jsonl")
        assert len(metrics) == 3 and all(f"rewards/{reward}" in row for row in metrics)
    assert policies["KLQ"]["kl"] != policies["no reward"]["kl"]
    text = capsys.readouterr().out
    assert "minus no reward" in text and "one training run" in text
    with pytest.raises(ValueError, match="temperature of the preset docsum"):
        load_preset("docsum", temperature=0.7, use_cpu=True)


@pytest.mark.parametrize("wrong", [{"size": "huge"}, {"eval_prompts": 1}, {"eval_samples": 0}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match="docsum"):
        load_preset("docsum", **wrong)


def test_rewards():
    assert docsum.rouge_l_reward(["a b", "c"], ["a b", "d"]) == [1.0, 0.0]
    assert docsum.no_reward(["a", "b"]) == [0.0, 0.0]
    assert KLQConfig(**docsum.DEFAULTS).tau == docsum.DEFAULTS["tau"]
