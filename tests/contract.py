"""What a path, a clock, a velocity, a step, a loss, a trunk, a backbone and data have to do.
train.py and sample.py ask this before they use it: of what comes with the project only whether its
options are possible, of a FILE:NAME all of it, on a handful of tokens of the model's own
vocabularies and at times that are dense near both ends; and of all data whether their rows are
tokens of the model. The first thing that is wrong ends the command with one sentence, an
InputError; an exception in one's own file stays as it is.

Whether what it returns is *right* is graded by exercises/test_yours.py.
"""
import copy
import inspect

import torch
from torch import nn

import fudoki
from sample import InputError, first_line, own_lines

ENDS = torch.logspace(-7, -1, 13)
TIMES = torch.cat([torch.zeros(1), ENDS, torch.linspace(0.1, 0.9, 33)[1:-1], 1 - ENDS.flip(0),
                   torch.ones(1)])
METHODS = dict(path="logits(self, x_1, t)", trunk="forward(self, h, places, visible, t)")


def asked(call, function, *arguments, **options):
    """What a call returns. InputError: it ends with an error that is not in one's own lines, such
    as one about its arguments."""
    try:
        return function(*arguments, **options)
    except InputError:
        raise
    except Exception as error:
        if own_lines(error):
            raise
        raise InputError(f"{call} ends with {type(error).__name__}: "
                         f"{first_line(error)}") from error


def same(call, found, shape, dtype="float32"):
    """InputError unless a call has returned a tensor of this shape, a tuple of (name, size)."""
    sizes = tuple(n for _, n in shape)
    if not torch.is_tensor(found):
        raise InputError(f"{call} returned {described(found)}, expected a tensor {sizes}")
    if found.shape != sizes:
        names = ", ".join(name for name, _ in shape)
        raise InputError(f"{call} returned {(*found.shape,)}, expected ({names}) = {sizes}")
    if dtype not in str(found.dtype):
        raise InputError(f"{call} returned numbers of the type {found.dtype}, expected "
                         f"torch.{dtype}")


def described(thing):
    """'None', or 'a Path', by the type."""
    return "None" if thing is None else f"{type(thing).__name__} {str(thing)[:40]!r}"


def is_class(name, entry, base, what):
    """InputError unless an entry makes modules: a class, or a function that returns one."""
    if isinstance(entry, nn.Module) or not callable(entry):
        raise InputError(f"{name} is an object, {described(entry)}; a {what} is a class, with "
                         f"{METHODS[what]}")
    if inspect.isclass(entry) and not issubclass(entry, base):
        raise InputError(f"{name} has to be a subclass of {base.__module__}.{base.__name__}")


def made(name, entry, *arguments, **options):
    """The module that an entry makes, and the call. InputError: it makes none."""
    listed = ", ".join(["embedding, frequency"][:len(arguments)]
                       + [f"{k}={v!r}" for k, v in options.items()])
    found = asked(f"{name}({listed})", entry, *arguments, **options)
    if "_modules" not in getattr(found, "__dict__", {}):
        raise InputError(f"{name}({listed}) is no module: its __init__ has to call "
                         f"super().__init__({'embedding, frequency' * bool(arguments)})")
    return found, f"{name}({listed})"


# -------------------------------------------------------------------------------- paths and clocks

def some(V, n):
    """At most n of V tokens, evenly spaced, first and last among them."""
    return torch.linspace(0, V - 1, min(V, n)).round().long()


def check_logits(name, path, V, what):
    """What a path that has been made says of V tokens of a modality, `what`: numbers, of the right
    shape, and the same ones whenever and beside whatever it is asked. -> p_t(x | x₁) of some x₁ at
    all TIMES, (x₁, t, x), and these x₁."""
    if not isinstance(path, fudoki.Path):
        raise InputError(f"{name} makes {described(path)}, which is no fudoki.Path")
    if type(path).logits is fudoki.Path.logits:
        raise InputError(f"{name} has no method {METHODS['path']}")
    if not torch.is_tensor(path.embedding) or len(path.embedding) < V:
        has = len(path.embedding) if torch.is_tensor(path.embedding) else "no"
        raise InputError(f"{name} has {has} rows in its buffer `embedding`, but there are {V} "
                         f"tokens of {what}; that name is fudoki.Path's")

    states, call = len(path.embedding), f"{name}.logits"
    x_1 = some(V, 4)
    l = asked(call, path.logits, x_1, torch.full((len(x_1), 1), 0.5))
    same(call, l, (("tokens", len(x_1)), (f"V, of {what}", states)))

    # all pairs of some tokens and all times
    tokens = some(V, max(2, 2 ** 20 // (len(TIMES) * states)))
    x_1, t = tokens.repeat_interleave(len(TIMES)), TIMES.repeat(len(tokens))[:, None]
    given = x_1.clone(), t.clone()
    l = asked(call, path.logits, x_1, t)
    same(call, l, (("tokens", len(x_1)), (f"V, of {what}", states)))
    if not (x_1.equal(given[0]) and t.equal(given[1])):
        raise InputError(f"{call} changes the x_1 or the t that it is given")
    bad = l.isnan().any(-1) | (l == torch.inf).any(-1) | (l == -torch.inf).all(-1)
    if bad.any():
        i = bad.nonzero()[0].item()
        values = [round(v, 2) for v in l[i, :6].tolist()]
        raise InputError(f"{call} has to be finite or −∞; at t = {t[i].item():.7g}, x_1 = "
                         f"{x_1[i].item()} of {what} it is {values}{' …' * (states > 6)}")

    # a function of x_1 and t, row by row
    if not torch.equal(l, path.logits(x_1, t)):
        raise InputError(f"{call} gives another answer when it is asked again: it may depend on "
                         "nothing but x_1 and t")
    p, alone = l.softmax(-1), [path.logits(x_1[i:i + 1], t[i:i + 1]) for i in (1, len(x_1) // 2)]
    for i, row in zip((1, len(x_1) // 2), alone):
        if row.shape != (1, states) or not torch.allclose(row.softmax(-1)[0], p[i], atol=1e-4):
            raise InputError(f"{call} of a token depends on the tokens that stand beside it")
    return p.view(-1, len(TIMES), states), tokens


def check_path(name, path, V, what):
    """As `check_logits`; and noise at t = 0 does not know x₁, which is certain at t = 1, unless
    another token has the same vector."""
    p, tokens = check_logits(name, path, V, what)
    off = (p[:, 0] - p[0, 0]).abs().amax(-1)
    if off.max() > 1e-3:
        raise InputError(f"{name} knows x_1 at t = 0 already: p_0(x | x_1) has to be the same for "
                         f"every x_1, but for x_1 = {tokens[0].item()} and x_1 = "
                         f"{tokens[off.argmax()].item()} of {what} it differs by {off.max():.2f}")

    kept, e = p[:, -1].gather(1, tokens[:, None])[:, 0], path.embedding[:V]
    single = [not e.shape[1] or (e == e[i]).all(-1).sum() == 1 for i in tokens.tolist()]
    unsure = (kept < 0.999) & torch.tensor(single)
    if unsure.any():
        i = unsure.nonzero()[0].item()
        raise InputError(f"{name} is not certain of x_1 at t = 1: token {tokens[i].item()} of "
                         f"{what} has p_1 = {kept[i]:.2f}")


def check_clock(name, path):
    """The clock of a path, which has been made by the entry."""
    t = TIMES[:, None]
    call = f"the clock of {name}"
    if not callable(path.clock):
        raise InputError(f"{name}(path) returned {described(path.clock)}, expected a function of "
                         "t, or a module")
    times = asked(call, path.clock, t)
    same(call, times, (("rows", len(t)), ("1", 1)))
    times = times.flatten()
    if not torch.isfinite(times).all() or times.min() < 0 or times.max() > 1:
        i = (~torch.isfinite(times) | (times < 0) | (times > 1)).nonzero()[0].item()
        raise InputError(f"{call} has to stay in [0, 1]; at t = {t[i].item():.7g} it is "
                         f"{times[i].item():.4g}")
    if (times.diff() < 0).any():
        i = (times.diff() < 0).nonzero()[0].item()
        raise InputError(f"{call} goes back between t = {t[i].item():.4g} and "
                         f"{t[i + 1].item():.4g}")
    if times[0] > 1e-4 or times[-1] < 1 - 1e-4:
        raise InputError(f"{call} has to go from 0 to 1; it goes from {times[0]:.4g} to "
                         f"{times[-1]:.4g}")


def check_again(call, path, again, V):
    """A path is copied by the averaging of weights, and one that is made `again` takes the state
    of the first out of a checkpoint. Then both are the same."""
    asked(f"a copy of {call}", copy.deepcopy, again)
    asked(f"opening a checkpoint of {call}", again.load_state_dict, path.state_dict())
    x_1, t = some(V, 4).repeat_interleave(3), torch.tensor([0.2, 0.5, 0.8]).repeat(min(V, 4))
    p_t, the_same = (each(x_1, t[:, None]).softmax(-1) for each in (path, again))
    if not torch.allclose(p_t, the_same, atol=1e-5):
        raise InputError(f"{call} is another path when it is made again, so no checkpoint of it "
                         "could be opened: register what it draws at random as a buffer")


# -------------------------------------------------------------------------------- what is learned

def rows(model, training, validation):
    """InputError: the rows of data, {name: (N, L)} each, are not tokens of the model."""
    name = model.hparams.notes["preset"]
    for what, x in (("training", training), ("validation", validation)):
        call = f"{name}.tokens(model): {what}"
        if not isinstance(x, dict):
            raise InputError(f"{call} is {described(x)}, expected a dictionary {{name: (N, L)}}")
        if x.keys() != model.tokens.keys():
            raise InputError(f"{call} has {', '.join(x) or 'nothing'}; the model has "
                             f"{', '.join(model.tokens)}")
        for m, kind in model.tokens.items():
            if not torch.is_tensor(x[m]):
                raise InputError(f"{call}, {m} is {described(x[m])}, expected a tensor (N, L)")
            if x[m].dtype != torch.long or x[m].ndim != 2 or x[m].shape[1] > kind.length:
                raise InputError(f"{call}, {m} is {(*x[m].shape,)} {x[m].dtype}; expected (N, L) "
                                 f"torch.int64 with L ≤ {kind.length}")

        counts = {m: len(x_m) for m, x_m in x.items()}
        if len({*counts.values()}) > 1 or not all(counts.values()):
            raise InputError(f"{call} has {counts} rows: each row has all modalities, so these "
                             "numbers are equal, and above 0")
        for m, kind in model.tokens.items():
            known, (least, most) = len(kind.embedding), (n.item() for n in x[m].aminmax())
            if least < 0 or most >= known:
                raise InputError(f"{call}, {m} has tokens from {least} to {most}; there are those "
                                 f"from 0 to {known - 1}")


# ------------------------------------------------------------------------- what moves along a path

def check_velocity(name, velocity, path, V):
    states = len(path.embedding)
    for time in (0.02, 0.5, 0.98):
        x_1 = some(V, 8)
        t = torch.full((len(x_1), 1), time)
        x_t = fudoki.corrupt(path, x_1, time)
        u = asked(f"{name}(path, x_t, x_1, t)", velocity, path, x_t, x_1, t)
        same(name, u, (("tokens", len(x_1)), ("V", states)))
        here = u.gather(1, x_t[:, None])
        if not torch.isfinite(u).all() or u.min() < -1e-4 or here.abs().max() > 1e-4:
            raise InputError(f"{name} at t = {time}: rates are finite, at least 0, and 0 from a "
                             f"token to itself; yours are from {u.min().item():.3g} to "
                             f"{u.max().item():.3g}, to itself {here.abs().max().item():.3g}")


def check_step(name, step, path, V):
    x_1 = some(V, 6).repeat(2, 1)
    states, call = len(path.embedding), f"{name}(path, x_t, x_1, t, s)"
    for t, s in ((0., 0.5), (0.5, 0.9)):
        x_t = fudoki.corrupt(path, x_1, t)
        goal = nn.functional.one_hot(x_1, V).float() if getattr(step, "posterior", False) else x_1
        x_s = asked(call, step, path, x_t, goal, t, s)
        same(name, x_s, (("rows", 2), ("tokens", x_1.shape[1])), "int")
        if x_s.min() < 0 or x_s.max() >= states:
            raise InputError(f"{name} returned tokens from {x_s.min().item()} to "
                             f"{x_s.max().item()}; there are those from 0 to {states - 1}")


def check_loss(name, loss, path, V):
    x_1 = some(V, 6).repeat(2, 1)
    l = torch.randn(*x_1.shape, V, requires_grad=True)
    x_t, t = fudoki.corrupt(path, x_1, 0.5), torch.full((2, 1, 1), 0.5)
    with torch.enable_grad():
        found = asked(f"{name}(path, p_1t, x_1, x_t, t)", loss, path, l, x_1, x_t, t)
        total = found.sum() if torch.is_tensor(found) else found
    same(name, found, (("rows", 2), ("tokens", x_1.shape[1])))
    if not torch.isfinite(found).all():
        raise InputError(f"{name} returned {found.min().item():.3g} to {found.max().item():.3g}; "
                         "a loss is finite")
    if not found.requires_grad or not torch.autograd.grad(total, l)[0].abs().sum() > 0:
        raise InputError(f"{name} does not depend on p_1t: nothing can be learned from it")


def check_trunk(name, options, tokens):
    """The trunk in a network: it returns what it is given, in shape."""
    def seen(module, given, found):
        B, N, width = given[0].shape
        same(f"{name}.forward", found, (("B", B), ("N", N), ("width", width)))
        if not torch.isfinite(found).all():
            raise InputError(f"{name}.forward returned numbers that are not finite")

    trunk, call = made(name, fudoki.TRUNKS[name], **options)
    call = f"a network with {call}"
    trunk.register_forward_hook(seen)
    paths = {m: fudoki.UniformPath(kind.embedding) for m, kind in tokens.items()}
    network = asked(call, fudoki.Network, tokens, paths, trunk)
    x = {m: torch.zeros(2, kind.length, dtype=torch.long) for m, kind in tokens.items()}
    free = {m: torch.ones_like(x_m, dtype=torch.bool) for m, x_m in x.items()}
    asked(call, network.eval(), x, free, 0.5)


def check_backbone(trunk, model, n):
    """A trunk made of a causal language model has the model's own logits when it looks back only;
    the last of n tokens changes what it says of all others; and padding changes nothing."""
    words, head = trunk.vocabulary["text"]
    few, x = torch.arange(3)[None], torch.arange(n)[None] % len(words.weight)
    try:
        back = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
        h = trunk.body(inputs_embeds=words(few), attention_mask=back, position_ids=few,
                       use_cache=False).last_hidden_state
        own = model(few).logits
        if not torch.allclose(head(h), own, rtol=1e-3, atol=1e-3 * own.std().item()):
            raise ValueError("its logits are not those of its head and its body's states")

        places = torch.zeros(n, 2)
        a, b = (trunk(words(x.index_fill(1, torch.tensor(n - 1), i)), places, None, None)
                for i in (0, 1))        # two sequences that differ in the last token
        if not (a != b).any(-1).all():
            raise ValueError("its mask cannot be taken away, what comes later changes nothing")

        # the second token is padding; what is said of the third is read from its own state
        visible = torch.arange(n)[None] != 1
        a, b = (trunk(words(x.index_fill(1, torch.tensor(1), i)), places, visible, None)[:, 3:]
                for i in (0, 1))
        if not torch.allclose(a, b, atol=1e-3 * a.std().item()):
            raise ValueError("padding changes what it says of other tokens")
    except Exception as error:          # a family may fail in its own way
        raise InputError(f"the backbone {model.name_or_path} ({model.config.model_type}) cannot "
                         f"be made to look both ways: {first_line(error)}") from error


@torch.no_grad()
@torch.random.fork_rng(devices=[])
def parts(options):
    """InputError: something among these arguments of `Fudoki` and of `generate` does not do what
    it has to. Random numbers go on as if nothing had been asked."""
    name = {k: options.get(k) or "" for k in "path clock trunk loss step velocity".split()}
    own = {k for k, v in name.items() if ":" in v}
    for what, base, entries in (("path", fudoki.Path, fudoki.PATHS),
                                ("trunk", nn.Module, fudoki.TRUNKS)):
        if what in own:
            is_class(name[what], entries[name[what]], base, what)

    # what does not go together
    sizes = options.get("trunk_options") or {}
    width, heads = (sizes.get(k) for k in ("width", "heads"))
    if options["trunk"] == "backbone" and "config" not in sizes:
        raise InputError("--trunk backbone needs a --backbone to start from")
    if options["trunk"] == "backbone" and options["path"] == "mask":
        raise InputError("--path mask needs a token that the backbone does not have")
    if options["trunk"] == "blocks" and str(heads).isdigit() and heads and width % (4 * heads):
        raise InputError(f"--width {width} is no multiple of 4·heads = {4 * heads}")

    # paths with few tokens if only their options are in question
    torch.manual_seed(0)
    tokens = {m: fudoki.TOKENS[m](*of) for m, of in options["tokens"].items()}
    frequency, paths = options.get("frequency") or {}, nn.ModuleDict()
    for m, kind in tokens.items():
        if m in frequency and frequency[m].shape != (V := len(kind.embedding),):
            raise InputError(f"the frequency of {m} is {(*frequency[m].shape,)}, expected ({V},)")
        embedding = kind.embedding if own else kind.embedding[:16]
        known = frequency[m][:len(embedding)] if m in frequency else None
        paths[m], call = made(name["path"], fudoki.PATHS[name["path"]], embedding, known,
                              **options.get("path_options") or {})
        if "path" in own:
            check_path(name["path"], paths[m], len(embedding), m)
        asked(f"{call} on the clock {name['clock']}", paths[m].on, name["clock"])
        if "clock" in own:
            check_clock(name["clock"], paths[m])
        if own & {"path", "clock"}:
            with torch.enable_grad():               # as training makes it
                again, _ = made(name["path"], fudoki.PATHS[name["path"]], embedding, known,
                                **options.get("path_options") or {})
            check_again(call, paths[m], again.on(name["clock"]), len(embedding))

        # what moves along them, and what learns
        check = dict(velocity=check_velocity, step=check_step, loss=check_loss)
        entries = dict(velocity=fudoki.VELOCITIES, step=fudoki.STEPS, loss=fudoki.LOSSES)
        for what in own & {*check}:
            check[what](name[what], entries[what][name[what]], paths[m], len(embedding))
        a, b = torch.tensor([[0]]), torch.tensor([[1]])
        asked(f"a step along {call}", fudoki.race, paths[m], a, b, 0., 0.5)
        asked(f"noise of {call}", fudoki.corrupt, paths[m], b, 0.5)

    if options.get("pretrained"):
        trunk = fudoki.Backbone(pretrained=options["pretrained"], **options["trunk_options"])
        check_backbone(trunk, options["pretrained"], sum(k.length for k in tokens.values()))
    elif name["trunk"] != "backbone":
        check_trunk(name["trunk"], options.get("trunk_options") or {}, tokens)
