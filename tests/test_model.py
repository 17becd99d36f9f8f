"""Tokenisers, network, loss and generation, on models that are too small to know anything."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import fudoki
import sample
import train
from fudoki import PATHS, STEPS, VELOCITIES

SLOTS = [["red", "blue"], ["round", "square"], ["one", "two", "three"]]
TEXTS = [" ".join(words) for words in itertools.product(*SLOTS)]
TINY = dict(width=32, depth=2, heads=2)


def small(path="metric", texts=TEXTS, trunk_options=TINY, **options):
    """A model of pictures of 3×3 patches, 12 of them, and of texts of three tokens."""
    torch.manual_seed(0)
    tokens = {"text": [train.tokenizer(texts), 3], "image": [torch.rand(12, 4), 2, 6]}
    return fudoki.Fudoki(tokens, path=path, trunk_options=trunk_options, **options).eval()


def captions(words, length, **options):
    """A model of texts of any length."""
    torch.manual_seed(0)
    text = [train.tokenizer(words, eos=["<end>"]), length, len(words)]
    return fudoki.Fudoki({"text": text, **options}, trunk_options=TINY).eval()


def batch(n=8):
    g = torch.Generator().manual_seed(1)
    return {"text": torch.randint(7, (n, 3), generator=g),
            "image": torch.randint(12, (n, 9), generator=g)}


def some(x, share=0.5):
    g = torch.Generator().manual_seed(2)
    return {m: torch.rand(x_m.shape, generator=g) < share for m, x_m in x.items()}


def learn(model, draw, steps, lr):
    """Trains a model for some steps on what `draw` returns."""
    model.log_dict = lambda *args, **kwargs: None
    optimizer = torch.optim.AdamW(model.train().parameters(), lr)
    for index in range(steps):
        optimizer.zero_grad()
        model.training_step(draw(), index).backward()
        optimizer.step()
    return model.eval()


def assert_follows(tokens, model, t):
    """These tokens of pictures are drawn from p_t(· | x₁ = 4), within five standard deviations."""
    p_t = model.paths["image"](torch.tensor([4]), torch.tensor([[t]])).softmax(-1)[0]
    found = torch.bincount(tokens.flatten(), minlength=len(p_t)) / tokens.numel()
    assert ((found - p_t).abs() <= 5 * (p_t * (1 - p_t) / tokens.numel()).sqrt() + 1e-6).all(), t


# -------------------------------------------------------------------------------------- tokenisers

def test_texts_are_words_in_lower_case():
    words = fudoki.Text(train.tokenizer([*TEXTS, "how many? two"]), 4)
    tokens = words.encode(["Red ROUND  one one", "how many? ___"])
    assert words.decode(tokens[:1]) == ["red round one one"]
    assert words.decode(words.encode(["how many ? two"])) == ["how many? two"]
    assert tokens[1].tolist()[3] == -1 and (tokens[1, :3] >= 0).all()
    assert fudoki.question(tokens, words.marks).tolist() == \
        [[False] * 4, [True, True, True, False]]
    with pytest.raises(ValueError, match="a part of 'a squre' is unknown; known: "):
        words.encode(["a squre"])
    for wrong in ("red red red red red", "red ___ red"):
        with pytest.raises(ValueError, match="has [35] tokens; 4 to 4 fit"):
            words.encode([wrong])


def test_what_stands_after_the_end_is_not_read():
    model = captions(["a", "dot"], 5)
    assert model.tokens["text"].decode(torch.tensor([[1, 2, 0, 1, 2], [0, 1, 1, 1, 1]])) == \
        ["dot", "a dot dot dot dot"]


def test_training_never_asks_for_a_question():
    model = small(texts=[*TEXTS, "red? yes"], clean=0.)
    texts = ["red? yes", "red round one"] * 4
    x = batch(8) | {"text": model.tokens["text"].encode(texts)}
    free = model.task(x)
    asked, caption = free["text"][:4].view(2, 2, 3).unbind(1)
    assert not asked[:, :2].any() and asked[:, 2].all() and caption.all()
    assert free["image"][4:].all() and not free["image"][:4].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_round_trip(channels):
    patches = fudoki.Patches(torch.rand(12, 4 * channels), 2, 6, channels)
    tokens = torch.randint(12, (5, 9))
    images = patches.decode(tokens)
    assert images.shape == (5, channels, 6, 6) and (patches.encode(images) == tokens).all()
    assert_close(images[0, :, :2, 2:4].flatten(), patches.embedding[tokens[0, 1]])     # row by row


def test_k_means_finds_clusters_and_keeps_the_blank_one():
    torch.manual_seed(0)
    truth = torch.tensor([[5., 0], [0, 5], [5, 5]])
    points = torch.cat([t + 0.1 * torch.randn(200, 2) for t in truth] + [torch.zeros(300, 2)])
    centres = train.k_means(points, 24)
    assert (centres[0] == 0).all() and torch.cdist(truth, centres).amin(1).max() < 0.2


def test_a_codebook_has_no_copies():
    torch.manual_seed(0)
    points = torch.rand(30, 16)[torch.randint(30, (5000,))]
    centres = train.k_means(points, 128)
    assert (centres[0] == 0).all() and 25 <= len(centres) <= 31
    d = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
    assert d.fill_diagonal_(1.).min() > 1e-2


def test_blank_patches_take_no_centres_from_the_others():
    """Most patches of a picture are blank; the first centre is for all of them."""
    torch.manual_seed(0)
    points = torch.cat([torch.zeros(4000, 4), torch.rand(200, 4)])
    assert len(train.k_means(points, 64)) >= 60


def test_every_centre_of_a_codebook_is_the_mean_of_its_points():
    """Two crowds far apart: most of 8 centres begin in the large one, and those that lose all of
    their points begin again."""
    torch.manual_seed(0)
    points = torch.cat([torch.randn(4000, 2) / 10 + 5, torch.randn(40, 2) / 10 - 5])
    centres = train.k_means(points, 8)
    near = torch.cdist(points, centres).argmin(-1)
    for i, centre in enumerate(centres[1:], 1):
        assert (near == i).any() and (points[near == i].mean(0) - centre).norm() < 0.05, i
    assert centres.isfinite().all()


# ----------------------------------------------------------------------------------------- network

def test_a_batch_of_eight_is_eight_batches_of_one():
    model, x = small(), batch()
    free = some(x)
    together = model.net(x, free, 0.)
    for i in range(8):
        alone = model.net(sample.take(x, [i]), sample.take(free, [i]), 0.)
        for m in x:
            assert_close(alone[m][0], together[m][i], atol=1e-5, rtol=1e-4)


def test_every_token_and_every_mark_of_freedom_reaches_every_output():
    model, x = small(), batch(1)
    free = some(x, 0.)
    before = model.net(x, free, 0.)
    for m in x:
        for i in range(x[m].shape[1]):
            other, open_ = ({k: v.clone() for k, v in d.items()} for d in (x, free))
            other[m][0, i] = (other[m][0, i] + 1) % 7
            open_[m][0, i] = True
            for after in (model.net(other, free, 0.), model.net(x, open_, 0.)):
                for k in x:
                    assert ((after[k] - before[k]).abs().amax(-1) > 1e-7).all(), (m, i, k)


def test_an_absent_modality_is_absent_from_the_sequence():
    model, x = small(), batch()
    whole = model.net(x, some(x), 0.)
    for m in x:
        alone = model.net({m: x[m]}, {m: some(x)[m]}, 0.)
        assert set(alone) == {m} and alone[m].shape == whole[m].shape
        assert (alone[m] - whole[m]).abs().max() > 1e-3             # the other one had its say
        free = {m: torch.ones_like(x[m], dtype=torch.bool)}
        *_, end = model.generate({m: x[m]}, free, steps=3)
        assert set(end) == {m}


def test_attention_sees_differences_of_coordinates_only():
    q, k = torch.randn(2, 1, 1, 7, 16).unbind(0)
    places = torch.rand(7, 2) * 5
    scores = [fudoki.turn(q, *fudoki.rotary(places + shift, 16)) @
              fudoki.turn(k, *fudoki.rotary(places + shift, 16)).transpose(-1, -2)
              for shift in (torch.zeros(2), torch.tensor([3., -1.]))]
    assert_close(*scores, atol=1e-4, rtol=1e-4)
    moved = places + torch.tensor([[1., 0]] + 6 * [[0, 0.]])
    turned = [fudoki.turn(q, *fudoki.rotary(where, 16)) for where in (moved, places)]
    assert (turned[0] - turned[1]).abs().max() > 0.1


def test_rotary_frequencies_fall_from_one_to_a_tenth():
    """One step in a coordinate turns pair k of its half by 10^(−k/n)."""
    for coordinate in (0, 1):
        step = torch.zeros(1, 2)
        step[0, coordinate] = 1.
        cos, sin = (part.view(2, 4) for part in fudoki.rotary(step, 16))
        angle = torch.tensor([1., 10 ** -.25, 10 ** -.5, 10 ** -.75])
        assert_close(cos[coordinate], angle.cos())
        assert_close(sin[coordinate], angle.sin())
        assert (cos[1 - coordinate] == 1).all() and (sin[1 - coordinate] == 0).all()


# -------------------------------------------------------------------------------------------- loss

def test_loss_is_the_mean_over_free_positions_then_over_samples():
    """Against a loop; at t = 1 nothing is noisy, so that the prediction can be computed apart."""
    model, x = small(), batch()
    free = some(x)
    loss, accuracy = model.loss(x, free, 1.)
    log_p = {m: l.log_softmax(-1) for m, l in model.net(x, free, 0.).items()}
    losses, rights = [], []
    for i in range(8):
        terms = [(-log_p[m][i, j, x[m][i, j]].item(),
                  (log_p[m][i, j].argmax() == x[m][i, j]).item())
                 for m in x for j in range(x[m].shape[1]) if free[m][i, j]]
        losses.append(sum(a for a, _ in terms) / len(terms))
        rights.append(sum(b for _, b in terms) / len(terms))
    assert_close(loss.item(), sum(losses) / 8, atol=1e-5, rtol=1e-5)
    assert_close(accuracy.item(), sum(rights) / 8, atol=1e-6, rtol=1e-6)


def test_noise_reaches_free_positions_only_and_each_row_has_its_time():
    model, x = small(), batch(256)
    free = some(x)
    t = (torch.arange(256) % 2).view(-1, 1, 1).float()
    noisy = model.corrupt(x, free, t)
    for m in x:
        assert (noisy[m][~free[m]] == x[m][~free[m]]).all()
        assert (noisy[m][1::2] == x[m][1::2]).all()                             # t = 1
        assert (noisy[m] != x[m])[::2][free[m][::2]].float().mean() > 0.6       # t = 0


@pytest.mark.parametrize("power", [1., 2.])
def test_noise_levels_of_training_are_spread_evenly_in_u(power):
    model, x, found = small(t_power=power), batch(64), []
    model.corrupt = lambda x_1, free, t: found.append(t) or x_1
    model.loss(x, some(x))
    u = found[0].flatten() ** (1 / power)
    for rows in (slice(0, 64), slice(0, 32), slice(40, 64)):        # whatever part of the batch
        part = u[rows].sort().values
        gaps = torch.cat([part.diff(), part[:1] + 1 - part[-1:]])
        assert gaps.max() < 2.1 / len(part) and 0 <= part[0] and part[-1] < 1


def test_loss_under_bfloat16_has_a_gradient_and_nearly_the_same_value():
    model, x = small().train(), batch(64)
    values = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = model.loss(x, some(x))
        assert loss.dtype == torch.float32
        values.append(loss.item())
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert_close(values[0], values[1], atol=0.02, rtol=0.02)


def test_both_directions_are_learned():
    """Pictures are a function of captions: after 300 steps either follows from the other."""
    words = torch.cartesian_prod(torch.arange(2), torch.arange(2, 4), torch.arange(4, 7))
    x = {"text": words, "image": words.repeat(1, 3) + 5 * (torch.arange(9) % 2)}
    model = learn(small(drop=0.3, t_power=2.),
                  lambda: sample.take(x, torch.randint(12, (48,))), 300, 6e-3)
    torch.manual_seed(1)
    options = dict(steps=4, guidance=2.5, temperature=0.5)
    drawn = sample.fill(model, options, text=x["text"])["image"]
    read = sample.read(model, x["image"])
    partial = x["text"].repeat(8, 1)
    partial[:, 1] = -1  # the model chooses this word itself
    whole = sample.fill(model, options, text=sample.complete(model, partial))
    assert (whole["text"] == partial)[:, ::2].all()
    matches = whole["image"] == whole["text"].repeat(1, 3) + 5 * (torch.arange(9) % 2)
    assert matches.float().mean() > 0.75                        # … one that belongs there
    assert torch.isin(whole["text"][:, 1], torch.tensor([2, 3])).float().mean() > 0.7
    assert (drawn == x["image"]).float().mean() > 0.9
    assert (model.tokens["text"].encode(read) == x["text"]).float().mean() > 0.9


def test_every_row_has_one_modality_to_find_by_its_share():
    """Whatever the modalities are called, and however many there are."""
    for share, texts in (({"image": 0.25, "text": 0.75}, 1500), (None, 1000)):
        free = small(share=share, clean=0.).task(batch(2000))
        assert free["text"].all(1).sum() == texts and free["image"].all(1).sum() == 2000 - texts
        assert (free["text"].any(1) != free["image"].any(1)).all()


def test_a_modality_that_is_alone_is_found_in_all_rows():
    model = small(share={"image": 0.25, "text": 0.75}, clean=0.)
    for m in ("image", "text"):
        assert model.task({m: batch(8)[m]})[m].all()


def test_validation_has_the_same_noise_every_time_and_a_tenth_of_the_rows_at_each_level():
    model, asked, logs = small(), [], []
    model.log_dict = lambda log, **_: logs.append(log)
    loss = model.loss
    model.loss = lambda x, free, t: asked.append((len(x["text"]), t)) or loss(x, free, t)
    for index in (0, 0, 1):
        model.validation_step(batch(40), index)
    assert asked[:10] == [(4, (i + 0.5) / 10) for i in range(10)]
    first, again, other = (logs[i:i + 20] for i in (0, 20, 40))
    assert first == again and first != other


def test_free_padding_is_visible_and_given_padding_is_not():
    """What the end of a text will be is not known before; what it is need not be looked at."""
    model, seen = captions(["a", "dot", "red"], 5), []
    model.net.trunk.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    x = {"text": torch.tensor([[0, 3, 3, 3, 3]])}
    for free in (True, False):
        model.net(x, {"text": torch.full((1, 5), free)}, 0.5)
    assert seen[0].all() and seen[1].tolist() == [[True, True, False, False, False]]


def test_some_rows_are_given_a_part_of_what_they_have_to_find():
    """A quarter of them by default, any share of their places; bounds of five standard errors."""
    for clean in (0.25, 1.):
        free = small(clean=clean).task(batch(8000))
        assert not free["text"][4000:].any() and not free["image"][:4000].any()
        spread = torch.bincount(free["image"][4000:].sum(1), minlength=10) / 4000     # of nine
        assert spread[0] == 0                       # where nothing would be left, all is
        assert (abs(spread[1:9] - clean / 10) < 5 * (clean / 10 / 4000) ** 0.5).all()
        assert abs(spread[9] - (1 - 0.8 * clean)) < 5 * (0.25 / 4000) ** 0.5


def test_modalities_are_left_out_of_a_batch_now_and_then():
    """What is left is found in all rows; one is always there."""
    seen = []
    for drop, most in ((0.3, 2), (1., 2), (0., 2)):
        model = small(drop=drop, clean=0.)
        model.log_dict = lambda *args, **kwargs: None
        model.loss = lambda x, free, position_loss: seen.append((drop, *x)) or (
            sum(f.any(1) for f in free.values()) == 1).all() and 2 * [torch.tensor(0.)]
        torch.manual_seed(0)
        for index in range(200):
            model.training_step(batch(4), index)
    assert {some[1:] for some in seen if some[0] != 0.3} == {("text", "image")}
    alone = sum(some in ((0.3, "text"), (0.3, "image")) for some in seen) / 200
    assert abs(alone - 2 * 0.3 * 0.7) < 5 * (0.42 * 0.58 / 200) ** 0.5


class Learned(fudoki.UniformPath):
    """A path with a parameter, and buffers that are no floats."""

    def __init__(self, embedding, frequency=None):
        super().__init__(embedding)
        self.speed = torch.nn.Parameter(torch.tensor(1.))
        self.register_buffer("known", torch.tensor([True, False]))
        self.register_buffer("steps", torch.tensor(3))

    def logits(self, x_1, t):
        return super().logits(x_1, t ** self.speed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimiser_has_every_parameter_once(optimizer, monkeypatch):
    """Those of a path, too; the matrices of the trunk are a group."""
    monkeypatch.setitem(PATHS, "learned", Learned)
    model = small("learned", optimizer=optimizer)
    model.trainer = SimpleNamespace(estimated_stepping_batches=10)
    (made,), _ = model.configure_optimizers()
    found = [p for group in made.param_groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(model.parameters()))
    assert any(p is model.paths["text"].speed for p in found)
    assert type(made) is (train.Muon if optimizer == "muon" else torch.optim.AdamW)
    for group in made.param_groups:
        assert group["weight_decay"] > 0 and not (group["matrices"] and any(
            p.ndim != 2 for p in group["params"]))


def test_parameters_of_a_path_learn(monkeypatch):
    """By a loss that looks at the path: the speed at which x_t is likely grows or falls."""
    def likely(path, p_1t, x_1, x_t, t):
        l = path(x_1, t).log_softmax(-1)
        return fudoki.cross_entropy(path, p_1t, x_1, x_t, t) - fudoki.entry(l, x_t)[..., 0]
    monkeypatch.setitem(PATHS, "learned", Learned)
    monkeypatch.setitem(fudoki.LOSSES, "likely", likely)
    model = small("learned", loss="likely").train()
    model.log_dict = lambda *args, **kwargs: None
    model.training_step(batch(64), 0).backward()
    for path in model.paths.values():
        assert path.speed.grad.isfinite() and path.speed.grad != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_buffers_of_any_dtype_survive_a_move(dtype):
    path = Learned(torch.rand(4, 2)).to(dtype)
    assert (path.known.tolist(), path.steps.item()) == ([True, False], 3)
    assert path.embedding.dtype == path.speed.dtype == torch.float32
    assert path.known.dtype == torch.bool and path.steps.dtype == torch.int64
    assert path.to("meta").steps.device.type == "meta"


# -------------------------------------------------------------------------------------- generation

@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step, velocity", [*((step, None) for step in STEPS),
                                            *(("euler", velocity) for velocity in VELOCITIES)])
def test_what_is_given_stays_as_it_is_and_what_is_free_changes(path, step, velocity):
    model, x = small(path), batch(32)
    free = {"text": torch.zeros_like(x["text"], dtype=torch.bool), "image": some(x)["image"]}
    states = list(model.generate(x, free, steps=4, step=step, velocity=velocity))
    assert len(states) == 5
    for state in states:
        assert all((state[m] == x[m])[~free[m]].all() for m in x)
    assert (states[-1]["image"] != states[0]["image"])[free["image"]].float().mean() > 0.4
    assert states[-1]["image"].max() < 12                                   # no [MASK] is left
    if path == "mask" and step in ("race", "euler") and velocity != "corrector":
        for a, b in zip(states, states[1:]):                                # final once revealed
            assert ((a["image"] == b["image"]) | (a["image"] == 12)).all()


def test_the_network_sees_what_is_given_clean_and_the_rest_on_its_path():
    model, x, seen = small(), {"image": torch.full((4000, 9), 4)}, []

    def forward(x, free, t):
        seen.append((t, x["image"], free["image"]))
        return {"image": 99. * torch.nn.functional.one_hot(torch.full((4000, 9), 4), 12)}
    model.net.forward = forward
    free = {"image": torch.arange(9).expand(4000, 9) < 4}
    list(model.generate(x, free, steps=3))
    assert len(seen) == 3
    for t, state, told in seen:
        assert (state[:, 4:] == 4).all() and (told == free["image"]).all()
        assert_follows(state[:, :4], model, t)


@pytest.mark.parametrize("path", PATHS)
def test_without_clean_rows_in_training_what_is_given_is_as_noisy_as_the_rest(path):
    """Given tokens follow p_t(· | x₁), whatever the network says, which sees them as free ones.
    Questions stand still."""
    model, x, seen = small(path, clean=0.), {"image": torch.full((4000, 9), 4)}, []

    def forward(x, free, t):
        seen.append(free["image"].all())
        return {"image": torch.randn(*x["image"].shape, 12)}
    model.net.forward = forward
    free = {"image": torch.arange(9).expand(4000, 9) < 4}
    for t, state in zip((0., 1 / 3, 2 / 3, 1.), model.generate(x, free, steps=3)):
        assert_follows(state["image"][:, 4:], model, t)
    assert len(seen) == 3 and all(seen)

    model = captions(["?", "a", "dot", "red", "what"], 6)
    model.hparams.clean = 0.
    x, free = model.to_fill(2, text=model.tokens["text"].encode(["what? a ___", "___"]))
    assert model.noisy(x, free)["text"].tolist() == [[False] * 2 + [True] * 4, [True] * 6]


def test_questions_and_what_is_given_beside_them_stay():
    model = captions(["?", "a", "dot", "red", "what"], 6)
    text = model.tokens["text"].encode(["what? a ___"] * 500 + ["___"] * 500)    # "?" is 0
    x, free = model.to_fill(1000, text=text)
    first, *_, last = (state["text"] for state in model.generate(x, free, steps=3))
    assert (first == x["text"])[:500, :3].all() and (last == x["text"])[:500, :3].all()
    assert (first[500:] != 0).float().mean() > 0.5


def test_a_seed_decides_the_result_and_the_placeholder_does_not():
    model, x = small(), batch()
    free = model.mark_free(x, "image")

    def run(seed, x):
        torch.manual_seed(seed)
        return [state["image"] for state in model.generate(x, free, steps=3)]
    for a, b in zip(run(3, x), run(3, x | {"image": torch.zeros_like(x["image"])})):
        assert (a == b).all()
    assert (run(3, x)[-1] != run(4, x)[-1]).any()


def test_guidance_goes_from_the_prediction_alone_to_the_one_with_the_other_modality():
    model, x = small(), batch()
    for names in (["image"], ["text"], ["text", "image"]):
        free = model.mark_free(x, *names)
        c = model.net(x, free, 0.)
        for g in (0., 1., 3.):
            found = model.predict(x, free, 0., g)
            for m in names:
                u = model.net({m: x[m]}, {m: free[m]}, 0.)[m]
                assert_close(found[m], u + g * (c[m] - u), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="another modality"):
        model.predict({"text": x["text"]}, {"text": free["text"]}, 0., 2.)


def test_temperature_zero_is_the_likeliest_and_small_ones_tend_to_it():
    model, x = small(), batch(64)
    free = model.mark_free(x, "image")
    torch.manual_seed(0)
    start, end = model.generate(x, free, steps=1, temperature=0.)
    assert (end["image"] == model.net(start, free, 0.)["image"].argmax(-1)).all()
    torch.manual_seed(0)
    *_, near = model.generate(x, free, steps=1, temperature=1e-3)
    assert (near["image"] == end["image"]).float().mean() > 0.99


@pytest.mark.parametrize("guidance, free, calls", [
    (1., ["image"], 1), (2., ["image"], 2), (2., ["text", "image"], 3)])
def test_guidance_costs_a_call_for_each_modality_that_is_filled(guidance, free, calls):
    model, x, seen = small(), batch(), []
    forward = model.net.forward
    model.net.forward = lambda x, *rest: seen.append(set(x)) or forward(x, *rest)
    list(model.generate(x, model.mark_free(x, *free), steps=3, guidance=guidance))
    assert len(seen) == 3 * calls
    assert seen[:calls] == [{"text", "image"}, *({m} for m in x if m in free)][:calls]


@pytest.mark.parametrize("guidance", [1., 2.])
def test_a_modality_that_is_given_takes_no_steps(guidance, monkeypatch):
    model, x, moved = small(), batch(), []
    monkeypatch.setitem(STEPS, "race", lambda path, x_t, *rest: moved.append(x_t.shape) or x_t)
    list(model.generate(x, model.mark_free(x, "image"), steps=3, guidance=guidance))
    assert moved == [x["image"].shape] * 2


def test_rows_do_not_depend_on_their_neighbours():
    """A caption that is given whole stays what it is beside one with a gap."""
    model, x = small(), batch(2)
    free = model.mark_free(x, "image")
    free["text"][1, 1] = True
    for state in model.generate(x, free, steps=3):
        assert (state["text"][0] == x["text"][0]).all()


def test_reading_hears_given_words():
    """A reader that repeats the first word it sees in the last place: it is the given one. What is
    given whole comes back as it was."""
    model = small()

    def reader(x, free, t):
        heard = x["text"][:, :1].expand(-1, 3)
        return {"text": 9. * torch.nn.functional.one_hot(heard, 7), "image": None}
    model.net.forward = reader
    texts = ["red square ___", "blue square ___"] * 100
    texts += ["red square one", "___"]                          # whole, and altogether free
    answers = sample.read(model, torch.zeros(202, 9, dtype=torch.long), texts)
    right = [a.split()[0] == a.split()[2] for a in answers[:200]]
    assert all(right) and answers[200] == "red square one"


def test_a_velocity_that_is_asked_for_moves_the_tokens(monkeypatch):
    """One that jumps at once and to the last token always."""
    def far(path, x_t, x_1, t):
        return 1e6 * path.one_hot(torch.full_like(x_1, 11)) * (x_t != 11)[..., None]

    monkeypatch.setitem(fudoki.VELOCITIES, "far", far)
    model, x = small(), batch(4)
    *_, before, end = model.generate(x, model.mark_free(x, "image"), steps=3, velocity="far")
    assert (before["image"] == 11).all()


def test_late_times_have_the_shortest_steps_at_the_end():
    """1 − t falls as (1 − u)^late: from t = .2 in 4 steps by .8 times 1, 9/16, 4/16, 1/16, 0."""
    made = fudoki.Fudoki({"image": [torch.rand(12, 4), 2, 6]},
                         trunk_options=dict(width=16, depth=1, heads=1))
    assert made.times(0., 4) == [0., 0.25, 0.5, 0.75, 1.]
    assert made.times(0.2, 4, 2.) == pytest.approx([0.2, 0.55, 0.8, 0.95, 1.])


def test_steps_below_one_are_refused():
    model, x = small(), batch()
    with pytest.raises(ValueError, match="steps must be at least 1"):
        next(model.generate(x, model.mark_free(x, "image"), steps=0))


@pytest.mark.parametrize("step", ["race", "renoise"])
def test_one_generation_step_of_an_oracle_follows_the_path(step):
    """A network that knows x₁ makes generation the conditional process: at every t, x_t ~ p_t."""
    model, x_1 = small(), torch.full((4000, 9), 4)
    model.net.forward = lambda x, free, t: {"image": 50. * torch.nn.functional.one_hot(x_1, 12)}
    free = {"image": torch.ones_like(x_1, dtype=torch.bool)}
    states = model.generate({"image": x_1}, free, steps=3, step=step)
    for t, state in zip((0., 1 / 3, 2 / 3, 1.), states):
        assert_follows(state["image"], model, t)


def test_a_start_at_t_is_the_draft_corrupted_to_t():
    model, x = small(), {"image": torch.full((4000, 9), 4)}
    free = {"image": torch.ones_like(x["image"], dtype=torch.bool)}
    assert_follows(next(model.generate(x, free, t=0.6))["image"], model, 0.6)
    first = next(model.generate(x, free, x_t=x, t=0.6))
    assert (first["image"] == 4).all()                          # goes on from a state as it is


def test_the_best_is_what_the_model_reads_best():
    """A reader that names the first patch: the best of three says its caption."""
    model = small()
    x = {"text": torch.tensor([[1, 3, 4]] * 3 + [[0, 2, 6]] * 3),
         "image": torch.tensor([[0], [1], [2], [2], [1], [0]]).repeat(1, 9)}
    heard = torch.tensor([[1, 3, 5], [1, 3, 4], [0, 2, 6]])

    def reader(x, free, t):
        assert free["text"].all() and not free["image"].any()
        return {"text": 3. * torch.nn.functional.one_hot(heard[x["image"][:, 0]], 7)}
    model.net.forward = reader
    free = {m: torch.full_like(x_m, m == "image", dtype=torch.bool) for m, x_m in x.items()}
    assert sample.best(model, x, free, 3).tolist() == [1, 3]
    p = math.exp(3) / (math.exp(3) + 6)                         # of the word it hears
    assert_close(sample.agreement(model, x, free)[1].item(), 3 * math.log(p), atol=1e-5, rtol=1e-5)


def test_all_that_was_free_is_judged_whatever_the_model_wrote_there():
    """A question that was asked is excused; one that the model asks itself is not."""
    model, seen = small(), []
    model.tokens["text"].marks = (3,)

    def reader(x, free, t):
        seen.append(free["text"][0].tolist())
        return {"text": torch.zeros(*x["text"].shape, 7)}
    model.net.forward = reader
    x = {"text": torch.tensor([[1, 3, 4]]), "image": torch.zeros(1, 9, dtype=torch.long)}
    for text in ([False, False, False], [False, False, True], [True, True, True]):
        free = {"text": torch.tensor([text]), "image": torch.zeros(1, 9, dtype=torch.bool)}
        score = sample.agreement(model, x, free).item()
        assert abs(score + sum(seen[-1]) * math.log(7)) < 1e-5
    assert seen == [[False, False, True], [False, False, True], [True, True, True]]


def test_start_frees_what_is_not_given():
    model = small()
    x, free = model.to_fill(2, text=torch.tensor([[1, -1, 6], [0, 2, 4]]))
    assert x["image"].shape == (2, 9) and free["image"].all()
    assert free["text"].tolist() == [[False, True, False], [False] * 3]
    assert x["text"].tolist() == [[1, 0, 6], [0, 2, 4]]


def test_learning_rate_rises_over_five_percent_and_ends_at_zero():
    model = small(lr=1.)
    model.trainer = SimpleNamespace(estimated_stepping_batches=200)
    (optimizer,), (schedule,) = model.configure_optimizers()
    schedule, rates = schedule["scheduler"], []
    for _ in range(201):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert_close(torch.tensor(rates[:9]), (torch.arange(9) + 1) / 10)
    assert rates[10] > 0.99 and math.isclose(rates[100], 0.5) and rates[200] == 0


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonal_keeps_the_directions_and_evens_the_lengths(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(g, full_matrices=False)
    within = u.T @ train.orthogonal(g) @ v.T                   # diagonal: the same U and V
    assert (within - within.diag().diag()).abs().max() < 1e-3
    assert within.diag().min() > 0.6 and within.diag().max() < 1.25 and s[0] > 1.5 * s[-1]


def test_muon_is_pytorchs_for_matrices_and_adamw_for_all_else():
    g = torch.Generator().manual_seed(0)
    start = [torch.randn(24, 8, generator=g), torch.randn(8, generator=g)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    both = dict(lr=0.01, weight_decay=0.1)
    muon = train.Muon([{"params": ours[:1], "matrices": True},
                        {"params": ours[1:], "matrices": False}], **both)
    others = (torch.optim.Muon(theirs[:1], adjust_lr_fn="match_rms_adamw", **both),
              torch.optim.AdamW(theirs[1:], **both))
    for _ in range(5):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        for optimizer in (muon, *others):
            optimizer.step()
    assert_close(ours[1], theirs[1])
    assert (ours[0] - theirs[0]).norm() < 0.03 * (ours[0] - start[0]).norm()        # bfloat16


def test_padding_of_a_given_caption_changes_nothing():
    model = captions(["a", "dot", "red"], 9, image=[torch.rand(12, 4), 2, 6])
    tokens = model.tokens["text"].encode(["a red dot", "dot a dot a red dot"])
    assert tokens[0].tolist() == [0, 2, 1, 3, 3, 3, 3]
    x, free = model.to_fill(2, text=tokens)
    one = {"text": tokens[:1, :4], "image": x["image"][:1]}
    alone = model.net(one, model.mark_free(one, "image"), 0.)
    assert_close(alone["image"][0], model.net(x, free, 0.)["image"][0], atol=1e-5, rtol=1e-4)
