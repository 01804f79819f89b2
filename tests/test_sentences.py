"""``hvae sentences``: the grammar against enumeration, the networks against formulas, texts, and the command."""

import itertools
import json
import math
import os
import random

import pytest
import torch
from hvae import cli, experiment, runs
from hvae.sentences import data, grammar, measure, models, study, train
from hvae.sentences.data import BEGIN, END, PADDING, SPECIAL, UNKNOWN, Batch
from hvae.sentences.grammar import Grammar
from hvae.sentences.models import SentenceModel
from hvae.sentences.study import METHODS, Job
from seen import check_what_is_seen
from torch.distributions import Normal

WORDS = 9

# ---- The grammar ----


def every(rules, symbols):
    """All that the symbols make, a way to make it at a time: words, and the way's probability."""
    if not symbols:
        yield (), 1.0
        return
    ways = rules.get(symbols[0], [(1.0, None)])
    for (p, way), (words, q) in itertools.product(ways, every(rules, symbols[1:])):
        heads = [((symbols[0],), 1.0)] if way is None else every(rules, way)
        for head, r in heads:
            yield head + words, p * q * r


def part_of_english():
    """Of two kinds of sentences, with fewer words."""
    whole = grammar.english()
    kinds = ("Sentence sea past one plain", "Sentence sea present one question")
    fewer = {
        name: ways[:2] for name, ways in whole.rules.items() if name.split()[0] in ("Adjective", "People", "Place")
    }
    return Grammar({**whole.rules, **fewer, "Text": [(1.0, kinds[:1]), (2.0, kinds[1:])]})


def test_probabilities_of_all_sentences_of_a_part_sum_to_one_and_give_the_entropy():
    part = part_of_english()
    found = dict(every(part.rules, ("Text",)))
    assert len(found) == 2 * 3 * 2 * 2 * 4 * 12 * 2 * 5
    logs = {words: part.log_prob(words) for words in found}
    assert all(math.exp(logs[words]) == pytest.approx(p, rel=1e-9) for words, p in found.items())
    assert math.fsum(map(math.exp, logs.values())) == pytest.approx(1, abs=1e-9)
    assert -math.fsum(math.exp(log) * log for log in logs.values()) == pytest.approx(part.entropy(), abs=1e-9)
    assert math.fsum(p * len(words) for words, p in found.items()) == pytest.approx(part.mean_length(), abs=1e-9)
    assert not part.ambiguous()


@pytest.mark.parametrize(
    "rules",
    [
        {
            "Text": [(1, ("a", "A", "c")), (3, ("a", "b", "c"))],
            "A": [(1, ("b",)), (1, ("d",))],
        },  # two ways from the start
        {"Text": [(1, ("a",)), (3, ("a",)), (1, ("b",))]},  # the start twice the same way
        {"Text": [(1, ("A", "A", "c"))], "A": [(2, ()), (1, ("b",))]},  # which of two is nothing
        {"Text": [(1, ("A", "c"))], "A": [(1, ()), (1, ()), (1, ("b",))]},  # one way twice
        {"Text": [(1, ("A", "B"))], "A": [(1, ("b",)), (1, ("b", "c"))], "B": [(1, ("c", "d")), (1, ("d",))]},
    ],
)
def test_ways_to_one_sentence_are_added_up_and_found_out(rules):
    ambiguous = Grammar(rules)
    sums = {}
    for words, p in every(ambiguous.rules, ("Text",)):
        sums[words] = sums.get(words, 0.0) + p
    assert {words: math.exp(ambiguous.log_prob(words)) for words in sums} == pytest.approx(sums)
    assert ambiguous.ambiguous()


def test_english_is_unambiguous_and_its_samples_have_its_entropy():
    english = grammar.english()
    assert not english.ambiguous()
    generator = random.Random(1)
    sentences = [english.sample(generator) for _ in range(1500)]
    assert {len(words) for words in sentences} == set(range(6, 16))
    assert len({" ".join(words) for words in sentences}) > 1490
    logs = torch.tensor([english.log_prob(words) for words in sentences], dtype=torch.float64)
    assert abs(-logs.mean() - english.entropy()) < 4 * logs.std() / math.sqrt(len(logs))
    lengths = torch.tensor([len(words) for words in sentences], dtype=torch.float64)
    assert abs(lengths.mean() - english.mean_length()) < 4 * lengths.std() / math.sqrt(len(lengths))


def test_properties_and_what_is_no_sentence():
    english = grammar.english()
    text = "do you think the young sailors will repair some boats near the island together ?"
    words = text.split()
    assert grammar.properties(english, words) == ("sea", "future", "several", "question")
    for place, wrong in ((4, "clever"), (5, "sailor"), (5, "knights"), (6, "repaired"), (-1, "."), (-2, "yesterday")):
        changed = [*words]
        changed[place] = wrong
        is_sentence = wrong == "clever"
        assert (english.log_prob(changed) > -math.inf) is is_sentence
        assert (grammar.properties(english, changed) is not None) is is_sentence
    for other in (words[:-1], [*words, "?"], []):
        assert english.log_prob(other) == -math.inf


# ---- The networks ----


def network(latent=3, inputless=False, loud=4.0):
    """A small one whose latent variables count."""
    model = SentenceModel(WORDS, latent, embedding=5, hidden=6, inputless=inputless).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(loud)
    return model


def sentences(*lengths):
    lengths = torch.tensor(lengths)
    words = torch.randint(len(SPECIAL), WORDS, (len(lengths), int(lengths.max())))
    return Batch(words.masked_fill(torch.arange(words.shape[1]) >= lengths.unsqueeze(1), PADDING), lengths)


def normals(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("inputless", [False, True])
@pytest.mark.parametrize("latent", [0, 3])
def test_every_word_by_its_formula(latent, inputless):
    """One sentence at a time and one word at a time; words that are dropped are still to be predicted."""
    model, batch = network(latent, inputless), sentences(4, 1, 6)
    noise = normals(3, latent)
    dropped = torch.rand(batch.words.shape) < 0.5
    scored = model(batch, noise, dropped)
    for row, length in enumerate(batch.lengths.tolist()):
        words = batch.words[row, :length]
        z, divergence, ratio = torch.zeros(latent).double(), 0.0, 0.0
        state = None
        if latent:
            _, (last, _) = model.encoder(model.read(words))
            mu, log_sigma = model.posterior(last[0]).split(latent)
            z = mu + log_sigma.exp() * noise[row]
            q, p = Normal(mu, log_sigma.exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))
            divergence = torch.distributions.kl_divergence(q, p).sum()
            ratio = (p.log_prob(z) - q.log_prob(z)).sum()
            first = model.first(z)
            state = first[:6].tanh().unsqueeze(0), first[6:].unsqueeze(0)
        total, seen = 0.0, BEGIN
        for place, target in enumerate([*words.tolist(), END]):
            read = torch.cat([model.embedding.weight[seen], z]).unsqueeze(0)
            states, state = model.decoder(read, state)
            total = total + model.output(states[-1]).log_softmax(-1)[target]
            hidden = inputless or (place < length and bool(dropped[row, place]))
            seen = UNKNOWN if hidden else target
        torch.testing.assert_close(scored.log_likelihood[row], total)
        torch.testing.assert_close(scored.divergence[row], torch.as_tensor(divergence, dtype=torch.float64))
        torch.testing.assert_close(scored.log_ratio[row], torch.as_tensor(ratio, dtype=torch.float64))


@pytest.mark.parametrize("latent", [0, 3])
def test_neither_padding_nor_company_counts(latent):
    model, batch = network(latent), sentences(4, 1, 6)
    noise = normals(3, latent)
    whole = torch.stack(model(batch, noise))
    wider = Batch(torch.cat([batch.words, torch.zeros(3, 5, dtype=torch.long)], 1), batch.lengths)
    padding = torch.arange(11) >= batch.lengths.unsqueeze(1)
    filled = Batch(wider.words.masked_fill(padding, 7), batch.lengths)
    for other in (wider, filled):
        torch.testing.assert_close(torch.stack(model(other, noise)), whole)
    for row, length in enumerate(batch.lengths.tolist()):
        alone = Batch(batch.words[row : row + 1, :length], batch.lengths[row : row + 1])
        torch.testing.assert_close(torch.stack(model(alone, noise[row : row + 1])), whole[:, row : row + 1])


def test_logits_that_come_a_few_at_a_time(monkeypatch):
    model, batch, noise = network(), sentences(4, 1, 6), normals(3, 3)
    whole = torch.stack(model(batch, noise))
    calls = []
    model.output.register_forward_hook(lambda module, read, result: calls.append(len(result)))
    monkeypatch.setattr(models, "LARGEST", 5 * WORDS + 1)
    torch.testing.assert_close(torch.stack(model(batch, noise)), whole)
    assert calls == [5, 5, 4]


@pytest.mark.parametrize("latent", [0, 3])
def test_the_decoder_sees_earlier_words_only(latent):
    model, batch = network(latent), sentences(6)
    logits = []
    model.output.register_forward_hook(lambda module, read, result: logits.append(result))
    z = normals(1, latent)
    for place in range(6):
        words = batch.words.clone()
        words[0, place] = 4 + (words[0, place] - 3) % (WORDS - 4)
        logits.clear()
        for each in (batch.words, words):
            model.log_likelihood(Batch(each, batch.lengths), z)
        before, after = logits
        assert torch.equal(before[: place + 1], after[: place + 1])
        assert (before[place + 1 :] != after[place + 1 :]).any(-1).all()


def test_all_sentences_of_one_word_or_none_but_the_mass_of_longer_ones():
    """p(x | z) is a distribution: what the first word and then the end leave is the mass of longer sentences."""
    model, z = network(), normals(1, 3)
    one = Batch(torch.arange(WORDS).unsqueeze(1), torch.ones(WORDS, dtype=torch.long))
    pairs = torch.cartesian_prod(torch.arange(WORDS), torch.arange(WORDS))
    two = Batch(pairs, torch.full((len(pairs),), 2))
    logits = []
    model.output.register_forward_hook(lambda module, read, result: logits.append(result.log_softmax(-1)))
    ends_after_two = model.log_likelihood(two, z.expand(len(pairs), -1)).exp().view(WORDS, WORDS)
    end = logits[0].view(len(pairs), 3, WORDS)[:, 2, END].exp().view(WORDS, WORDS)
    ends_after_one = model.log_likelihood(one, z.expand(WORDS, -1)).exp()
    mass_of_two = ends_after_two / end  # of what begins with the two words
    first = logits[1].view(WORDS, 2, WORDS)[0, 0].exp()
    torch.testing.assert_close(mass_of_two.sum(1), first)
    torch.testing.assert_close(mass_of_two[:, END], ends_after_one)


def test_weights_and_bound_against_the_exact_evidence():
    model, batch = network(latent=1), sentences(3, 5)
    with torch.no_grad():
        model.posterior.weight.mul_(0.2), model.posterior.bias.mul_(0.2)
        line = torch.linspace(-9, 9, 4001, dtype=torch.float64).unsqueeze(1)
        prior = Normal(0.0, 1.0).log_prob(line).sum(-1) + math.log((line[1] - line[0]).item())
        for row in range(2):
            one = Batch(batch.words[row : row + 1], batch.lengths[row : row + 1])
            many = Batch(one.words.expand(4001, -1), one.lengths.expand(4001))
            exact = (model.log_likelihood(many, line) + prior).logsumexp(0)
            scored = model(Batch(one.words.expand(20_000, -1), one.lengths.expand(20_000)), normals(20_000, 1))
            ratios = (scored.log_weight - exact).exp()
            assert ratios.std() / math.sqrt(len(ratios)) < 0.05, "or a wrong weight could not be told"
            assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(len(ratios))
            assert scored.bound.mean() < exact - 4 * scored.bound.std() / math.sqrt(len(ratios)), (
                "the gap is to be seen"
            )
            difference = scored.divergence + scored.log_ratio
            assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))


def test_log_likelihood_of_samples_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLES_AT_A_TIME", 3)
    model, batch = network(), sentences(4, 1)
    parts = [normals(n * 2, 3) for n in (3, 3, 1)]
    estimate = measure.log_likelihood(model, batch, 7, lambda number, shape: parts[number].view(shape))
    weights = [
        torch.stack([model(batch, noise).log_weight for noise in part.view(n, 2, 3)])
        for n, part in zip((3, 3, 1), parts, strict=True)
    ]
    torch.testing.assert_close(estimate, torch.cat(weights).logsumexp(0) - math.log(7))


@pytest.mark.parametrize("inputless", [False, True])
def test_generated_words_are_the_likeliest_or_have_their_probabilities(inputless):
    model = network(inputless=inputless, loud=2.0)
    z = normals(5, 3)
    greedy = model.generate(z, 4)
    for row, found in enumerate(greedy.tolist()):
        length = found.index(END) if END in found else len(found)
        assert set(found[length + 1 :]) <= {PADDING}
        for place in range(min(length + 1, len(found))):
            begun = torch.tensor([found[:place] + [word, 0, 0, 0][: 4 - place] for word in range(WORDS)])[
                :, : place + 1
            ]
            logits = []
            hook = model.output.register_forward_hook(lambda module, read, result: logits.append(result))  # noqa: B023
            model.log_likelihood(Batch(begun, torch.full((WORDS,), place + 1)), z[row : row + 1].expand(WORDS, -1))
            hook.remove()
            assert logits[0].view(WORDS, place + 2, WORDS)[0, place].argmax() == found[place]
    count = 20_000
    drawn = model.generate(z[:1].expand(count, -1), 2, torch.rand(2, count))
    one = Batch(torch.full((1, 1), 5), torch.ones(1, dtype=torch.long))
    shares = []
    model.output.register_forward_hook(lambda module, read, result: shares.append(result.softmax(-1)))
    model.log_likelihood(one, z[:1])
    first, second = shares[0]
    frequency = torch.bincount(drawn[:, 0], minlength=WORDS) / count
    assert (frequency - first).abs().max() < 4 * math.sqrt(0.25 / count)
    followed = drawn[drawn[:, 0] == 5, 1]
    frequency = torch.bincount(followed, minlength=WORDS) / len(followed)
    assert (frequency - second).abs().max() < 4 * math.sqrt(0.25 / len(followed))
    assert (drawn[drawn[:, 0] == END, 1] == PADDING).all()


def test_lines_lead_from_one_sentence_to_the_other():
    model, ends = network(), normals(6, 3)
    lines = measure.interpolations(model, ends, 5)
    assert [line.shape[0] for line in lines] == [measure.N_POINTS] * 3
    for index, line in enumerate(lines):
        t = 2 / (measure.N_POINTS - 1)
        points = torch.stack(
            [ends[2 * index], (1 - t) * ends[2 * index] + t * ends[2 * index + 1], ends[2 * index + 1]]
        )
        expected = model.generate(points, 5)
        chosen = line[[0, 2, -1]]
        assert torch.equal(chosen[:, : expected.shape[1]], expected)
        assert (chosen[:, expected.shape[1] :] == PADDING).all()


def test_active_units_are_those_whose_mean_moves():
    corpus = data.of_grammar(1, 20, 300)
    model = SentenceModel(len(corpus.vocabulary), 3, 5, 6)
    with torch.no_grad():
        model.posterior.weight.zero_()
        assert measure.active_units(model, corpus.held_out) == 0
        model.posterior.weight[1].fill_(1.0)
        means = measure.posterior_means(model, corpus.held_out)
        model.posterior.weight[1].mul_(0.2 / means[:, 1].std())
        assert measure.active_units(model, corpus.held_out) == 1
        model.posterior.weight[1].mul_(0.4)
        assert measure.active_units(model, corpus.held_out) == 0


@pytest.mark.parametrize(("annealing", "middle"), [("linear", 0.25), ("logistic", 1 / (1 + math.exp(3)))])
def test_annealing(annealing, middle):
    weights = [study.kl_weight(step, 40, annealing) for step in range(81)]
    assert weights == sorted(weights)
    assert weights[0] == pytest.approx(0, abs=0.003)
    assert weights[10] == pytest.approx(middle)
    assert weights[20] == pytest.approx(0.5)
    assert weights[40] == pytest.approx(1, abs=0.003)
    assert weights[80] == pytest.approx(1, abs=1e-6)


def test_only_jobs_of_word_dropout_drop_words_and_as_many_as_said():
    setting = a_setting(data.of_grammar(1, 400, 20), word_dropout=0.3)
    batch = data.of_grammar(1, 400, 20).train.batch(torch.arange(400))
    for name, method in METHODS.items():
        dropped = Job(name, 1).dropped(batch, setting, 0)
        assert (dropped is not None) is method.dropout
        if method.dropout:
            assert dropped.double().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / dropped.numel()))


# ---- Training ----


def a_setting(corpus, **changes):
    sizes = {"seed": 1, "data": "grammar", "checksum": "grammar", "n_train": len(corpus.train), "epochs": 6}
    sizes.update(n_held_out=len(corpus.held_out), hidden=24, latent=4, word_dropout=0.5, annealing="linear")
    return study.Setting(
        **{**sizes, "annealing_epochs": 3, "likelihood_sentences": 50, "likelihood_samples": 20, **changes}
    )


def test_what_ties_words_is_learned(tmp_path, monkeypatch):
    """Better than every word by how often it stands in its place, and never better than the truth."""
    monkeypatch.setattr(study, "LEARNING_RATE", 1e-2)
    corpus = data.of_grammar(1, 2000, 200)
    setting = a_setting(corpus)
    state, by_place = train.State(), train.State()
    with experiment.threads(1):
        train.train(Job("vae", 1), setting, corpus, state, tmp_path / "state.pt", lambda state: None)
        train.train(Job("inputless-rnn", 1), setting, corpus, by_place, tmp_path / "other.pt", lambda state: None)
    assert state.figures["log_likelihood"] > by_place.figures["log_likelihood"] + 5
    assert state.figures["gap"] > 4 * state.figures["gap_error"]
    assert state.history[-1]["divergence"] > 0.1


def test_a_bound_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATE", 1e30)
    corpus = data.of_grammar(1, 300, 20)
    with pytest.raises(runs.StudyError, match=r"vae-plain: the bound of epoch \d is not finite"):
        train.train(
            Job("vae-plain", 1), a_setting(corpus), corpus, train.State(), tmp_path / "state.pt", lambda state: None
        )


# ---- Texts ----


def text_file(path, lines):
    path.write_bytes("\n".join(lines).encode())
    return path


def test_a_text_is_numbered_and_every_tenth_sentence_held_out(tmp_path):
    lines = [f"the cat{'s' * (i % 2)} sat on <unk> mat {i}" for i in range(1, 41)]
    lines[4] = ""
    lines[7] = "too " * 9
    lines[10] = "é bien <s>"
    found = data.of_file(text_file(tmp_path / "text", lines), min_count=2, max_words=8)
    kept = [line.split() for line in lines if 0 < len(line.split()) <= 8]
    assert (found.left_out, found.longest, found.truth) == (1, 7, None)
    assert (len(found.train), len(found.held_out)) == (35, 3)
    assert found.vocabulary == [*SPECIAL, "cat", "cats", "mat", "on", "sat", "the"]
    for part, expected in (
        (found.train, [line for index, line in enumerate(kept, 1) if index % 10]),
        (found.held_out, kept[9::10]),
    ):
        batch = part.batch(torch.arange(len(part)))
        known = [[word if word in found.vocabulary[4:] else "<unk>" for word in line] for line in expected]
        assert found.texts(batch.words) == known
        assert batch.lengths.tolist() == [len(line) for line in known]
    assert found.unknown == pytest.approx(6 / 21)


def test_marks_are_words_of_their_own(tmp_path):
    lines = ["\u00c9mile's well-kept dog, 'tis said: don't--<unk> (2\u2019s a pair)!"] * 20
    found = data.of_file(text_file(tmp_path / "text", lines), min_count=1, max_words=40)
    expected = ["\u00c9mile's", "well-kept", "dog", ",", "'tis", "said", ":", "don't", "--", "<unk>"]
    expected += ["(", "2\u2019s", "a", "pair", ")!"]
    assert found.texts(found.train.batch(torch.arange(1)).words) == [expected]


@pytest.mark.parametrize(
    "word", ["\u0939\u093f\u0928\u094d\u0926\u0940", "e\u0301te\u0301", "\u0e20\u0e32\u0e29\u0e32", "a_1"]
)
def test_words_of_any_script_stay_whole(word):
    assert data.WORD.findall(f"({word}, {word}-{word}) {word}\u0964") == [
        "(",
        word,
        ",",
        f"{word}-{word}",
        ")",
        word,
        "\u0964",
    ]


def test_no_more_of_a_line_is_read_than_shows_that_it_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LONGEST_LINE", 16)
    lines = ["a b c"] * 20 + ["x" * 16, "a " * 50, "b" * 15, "c " * 8]
    found = data.of_file(text_file(tmp_path / "text", lines), min_count=1, max_words=4)
    assert (len(found.train) + len(found.held_out), found.left_out) == (21, 3)
    whole = data.of_file(text_file(tmp_path / "other", [*lines, "a"]), min_count=1, max_words=4)
    assert whole.checksum != found.checksum


# ---- The command ----

OF_GRAMMAR = ("--train-size=300", "--held-out-size=40")
SIZES = ("--epochs=2", "--annealing-epochs=1", "--hidden=12", "--latent=3")
SIZES += ("--likelihood-sentences=45", "--likelihood-samples=7")


@pytest.fixture(autouse=True)
def fewer(monkeypatch):
    for name, count in (("N_GENERATED", 20), ("N_LINES", 4), ("N_REBUILT", 15)):
        monkeypatch.setattr(measure, name, count)


def hvae(out, *more):
    size = () if any(option.startswith("--data") for option in more) else OF_GRAMMAR
    return cli.main(["sentences", *SIZES, *size, "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "sentences"
    with pytest.MonkeyPatch.context() as patch:
        fewer.__wrapped__(patch)
        assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert (row["epochs"], row["steps_taken"], row["likelihood_sentences"]) == (2, 6, 40)
        assert row["gap"] == pytest.approx(row["true_log_likelihood"] - row["log_likelihood"])
        assert row["entropy"] == grammar.english().entropy()
        if row["dim"]:
            assert row["steps"] == 28
            assert row["bound"] < row["log_likelihood"] + 1
        else:
            assert row["bound"] == pytest.approx(row["log_likelihood"], abs=1e-4)
        assert math.log(row["perplexity"]) == pytest.approx(-row["log_likelihood"] / (mean_length(finished) + 1))
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("model ")
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    for method in METHODS.values():
        assert f"| {method.label} " in text
        assert f"### {method.label}: samples" in text


def mean_length(out):
    config = results(out)["config"]
    held_out = study.corpus("grammar", config["seed"], config["n_train"], config["n_held_out"], 1, 40).held_out
    return len(held_out.words) / len(held_out)


@pytest.mark.parametrize("stop", ["train_epoch", "log_likelihood"])
def test_a_killed_run_goes_on_to_the_same_bits(stop, finished, tmp_path, monkeypatch, capsys):
    place = train if stop == "train_epoch" else measure
    whole, calls = getattr(place, stop), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    only = ("--models", "vae", "inputless-rnn")
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(place, stop, killed)
        assert hvae(tmp_path, *only) == 130
    assert "--resume" in capsys.readouterr().err
    assert hvae(tmp_path, *only, "--resume") == 0
    expected = [row for row in results(finished)["rows"] if row["method"] in only]
    assert without_times(results(tmp_path)["rows"]) == without_times(expected)
    ours, other = (torch.load(out / "jobs" / "vae.pt", weights_only=True) for out in (tmp_path, finished))
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
    assert ours["texts"] == other["texts"]


def test_resume_adds_to_a_finished_run_of_the_same_kind(finished, capsys):
    before = results(finished)["rows"]
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert hvae(finished, "--resume") == 0
    assert results(finished)["rows"] == before
    assert hvae(finished, "--resume", "--word-dropout=0.25") == 1
    assert "was made with word_dropout 0.5, not 0.25" in capsys.readouterr().err


def test_a_text_of_ones_own(tmp_path, capsys):
    lines = [f"a {'very ' * (i % 4)}small | text *{i}*" for i in range(60)]
    path = text_file(tmp_path / "text", lines)
    models = ("--models", "rnn", "vae", f"--data={path}", "--max-words=8")
    assert hvae(tmp_path / "out", *models) == 0
    config, rows = (results(tmp_path / "out")[name] for name in ("config", "rows"))
    assert (config["n_train"], config["n_held_out"]) == (27, 3)
    assert [row.get("gap") for row in rows] == [None, None]
    text = (tmp_path / "out" / "report.md").read_text()
    assert config["corpus"]["unknown"] == pytest.approx(3 / 24)
    assert "30 sentences of more than 8 words left out" in text
    assert "of the held-out words are unknown" in text
    assert "above the truth" not in text.split("## Likelihood")[1]
    assert "small \\| text \\* \\<unk\\> \\*" in text
    text_file(path, [*lines, "another line"])
    assert hvae(tmp_path / "out", *models, "--resume") == 1
    assert "was made with checksum" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    ["--epochs=0", "--word-dropout=1.5", "--models=chess", "--annealing=none", "--seed=-1", "--held-out-size=1"],
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--min-count", "2"], "--min-count: only a text, --data FILE, has any"),
        (["--max-words", "9"], "--max-words: only a text, --data FILE, has any"),
        (["--data", "x", "--train-size", "9"], "--train-size: only --data grammar has any"),
        (["--data", "x", "--held-out-size", "9"], "--held-out-size: only --data grammar has any"),
    ],
)
def test_options_of_the_other_data_are_refused(wrong, said, tmp_path, capsys):
    assert cli.main(["sentences", *wrong, "--out", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "has 0 sentences of 1 to 40 words: at least 20 are needed"),
        (b"\n \n" * 30, "has 0 sentences"),
        (b"word " * 41 + b"\nshort\n", "has 1 sentences"),
        (b"good\n" * 25 + b"caf\xe9\n", "is not UTF-8: line 26 has the byte 0xe9"),
    ],
)
def test_texts_that_do_not_do_are_one_sentence(content, message, tmp_path, capsys):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert hvae(tmp_path / "out", f"--data={path}") == 1
    said = capsys.readouterr().err
    assert message in said
    assert str(path) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_mark_of_byte_order_is_no_word(tmp_path):
    texts = [tmp_path / name for name in ("plain", "marked")]
    for path, mark in zip(texts, (b"", b"\xef\xbb\xbf"), strict=True):
        path.write_bytes(mark + b"some words\n" * 25)
    plain, marked = (data.of_file(path, 1, 40) for path in texts)
    assert marked.vocabulary == plain.vocabulary


def test_a_pipe_is_no_text(tmp_path, capsys):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    assert hvae(tmp_path / "out", f"--data={path}") == 1
    assert "not a file, and it is read three times" in capsys.readouterr().err


def test_a_folder_is_no_text(tmp_path, capsys):
    assert hvae(tmp_path / "out", f"--data={tmp_path}") == 1
    assert "Is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda row: row.pop("bound"), lambda row: row.update(method="chess")])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    content = results(finished)
    change(content["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


def test_an_annealing_longer_than_the_training_is_refused(tmp_path, capsys):
    command = ["sentences", "--epochs", "2", "--annealing-epochs", "3", "--train-size", "50", "--out", str(tmp_path)]
    assert cli.main(command) != 0
    assert "--annealing-epochs 3 is more than --epochs 2" in capsys.readouterr().err
