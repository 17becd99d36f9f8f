"""Language models of transformers as the trunk, and the tokenisers of texts."""
import math
import types

import contract
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

import fudoki
import sample
import train
from fudoki import STEPS, corrupt

STORY = "the cat sat on the mat . the dog ran to the cat ! a red hat was on the dog . " * 30
COMMON = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, intermediate_size=48, bos_token_id=0, eos_token_id=1,
              pad_token_id=1)
FAMILIES = {
    "llama": COMMON, "qwen2": COMMON, "qwen3": COMMON | dict(head_dim=8), "smollm3": COMMON,
    "mistral": COMMON | dict(sliding_window=4), "gemma": COMMON | dict(head_dim=8),
    "gemma3_text": COMMON | dict(head_dim=8, sliding_window=4),
    "mixtral": COMMON | dict(num_local_experts=2),
    "opt": COMMON | dict(ffn_dim=48, word_embed_proj_dim=32),
    "gpt2": dict(vocab_size=60, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)}


def tokenizer():
    """A small byte-pair tokenizer: 0 begins, 1 ends a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([STORY], trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<s>", "</s>"], show_progress=False))
    return made


def model(family="llama", **options):
    """A model with random weights; pictures of 9 tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family]).to_dict()
    tokens = {"text": [tokenizer().to_str(), 12, 1, False, torch.randn(60, 8)],
              "image": [torch.rand(12, 4), 2, 6]}
    return fudoki.Fudoki(tokens, trunk="backbone", trunk_options=dict(config=config, bos=0),
                         **options).eval()


def batch(captions=("the cat sat on the mat", "a dog")):
    g = torch.Generator().manual_seed(1)
    return {"text": fudoki.Text(tokenizer().to_str(), 12, 1).encode(captions),
            "image": torch.randint(12, (len(captions), 9), generator=g)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_every_earlier_output(family):
    net, x = model(family).net, batch()
    free = {m: torch.ones_like(x_m, dtype=torch.bool) for m, x_m in x.items()}
    before = net(x, free, 0.)
    x["image"][:, -1] = (x["image"][:, -1] + 1) % 12
    after = net(x, free, 0.)
    for m in x:
        assert ((after[m] - before[m]).abs().amax(-1) > 1e-7).all(), m


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    net, x = model(family).net, batch()
    free = {"text": torch.zeros_like(x["text"], dtype=torch.bool), "image": x["image"] >= 0}
    together = net(x, free, 0.)["image"]
    for i, text in enumerate(x["text"]):
        n = text.tolist().index(1) + 1
        alone = net({"text": text[None, :n], "image": x["image"][[i]]},
                    {"text": free["text"][[i], :n], "image": free["image"][[i]]}, 0.)["image"]
        assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)
    assert (x["text"][1] == 1).sum() > 2                            # there was padding


@pytest.mark.parametrize("family", FAMILIES)
def test_token_i_is_predicted_from_the_state_of_the_one_before(family):
    """With a body that returns its input, output i is input i − 1, and output 0 the start."""
    trunk, seen_by = model(family).net.trunk, []

    def body(inputs_embeds, **options):
        seen_by.append(options)
        return types.SimpleNamespace(last_hidden_state=inputs_embeds)
    trunk.body.forward = body
    h, places = torch.randn(2, 5, 32), torch.zeros(5, 2)
    seen = torch.tensor([[True] * 5, [True, True, False, True, True]])
    out = trunk(h, places, seen, None)
    assert_close(out[:, 1:], h[:, :-1])
    assert_close(out[:, 0], trunk.words(torch.tensor([0, 0])))
    assert seen_by[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 2, 3, 4]]
    trunk.shift = False
    assert_close(trunk(h, places, seen, None), h)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pretrained_model_is_what_starts(family):
    """Its weights, its words as the metric; where there is nothing ahead, its own logits."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    causal = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():                                       # as if it had learned something
        for p in causal.parameters():
            p.add_(0.2 * torch.randn_like(p))
    words = causal.get_input_embeddings().weight
    made = fudoki.Fudoki({"text": [tokenizer().to_str(), 12, None, True, words.detach()]},
                         pretrained=causal, trunk="backbone",
                         trunk_options=dict(config=config.to_dict(), bos=0)).eval()
    x, trunk = torch.tensor([[7, 20, 3]]), made.net.trunk
    places, hidden = torch.ones(3, 2), torch.zeros_like(x, dtype=torch.bool)
    h = trunk(made.net.input["text"](x), places, hidden, None)
    assert_close(made.net.head["text"](h[:, :1]), causal(torch.tensor([[0]])).logits)
    assert_close(made.paths["text"].embedding, words)
    contract.check_backbone(trunk, causal, 12)                  # the model is still whole
    free = {"text": torch.zeros_like(x, dtype=torch.bool)}
    out = made.net({"text": x}, free, 0.)["text"]
    free["text"][:] = True                                      # the mark disturbs nothing yet
    assert_close(made.net({"text": x}, free, 0.)["text"], out)
    assert made.net.input["text"].words.weight is words
    assert all(p is q for p, q in zip(made.net.head["text"].parameters(),
                                      causal.get_output_embeddings().parameters()))


def test_special_tokens_are_neither_added_nor_left_out():
    from tokenizers import processors
    made = train.tokenizer(["a", "dot", "red"])
    other = Tokenizer.from_str(made)
    other.add_special_tokens(["<s>"])
    first = other.token_to_id("<s>")
    other.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", first)])
    words = fudoki.Text(other.to_str(), 9, window=True)
    assert words.ids("red dot") == fudoki.Text(made, 9, window=True).ids("red dot")
    assert "<s>" in words.decode(torch.tensor([[first, *words.ids("red dot")]]))[0]


@pytest.mark.parametrize("family, options, says", [
    ("gpt_neo", dict(vocab_size=60, hidden_size=32, num_layers=2, num_heads=4,
                     attention_types=[[["global", "local"], 1]]), "what comes later"),
    ("gpt2", FAMILIES["gpt2"] | dict(n_positions=12), "index out of range"),
    ("gemma2", COMMON | dict(head_dim=8, final_logit_softcapping=0.1), "logits are not those"),
    ("granite", COMMON | dict(logits_scaling=8., embedding_multiplier=12.), "logits are not"),
    ("cohere", COMMON | dict(logit_scale=0.06), "logits are not those of its head"),
    ("lfm2", COMMON | dict(layer_types=["conv", "full_attention"]), "padding changes what it")])
def test_what_cannot_be_a_trunk_is_refused_by_name(family, options, says):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    causal = AutoModelForCausalLM.from_config(config).eval()
    for p in causal.parameters():                               # as if it had learned something
        p.data += 0.1 * torch.randn_like(p)
    trunk = fudoki.Backbone(config.to_dict(), 0, pretrained=causal)
    with pytest.raises(sample.InputError, match=rf"backbone .*\({family}\) .*{says}"):
        contract.check_backbone(trunk, causal, 12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_checkpoint_needs_nothing_else(family, tmp_path):
    first = model(family)
    hyper = dict(first.hparams)
    torch.save({"state_dict": first.state_dict(), "hyper_parameters": hyper,
                "pytorch-lightning_version": "2.6.6"}, tmp_path / "model.ckpt")
    again = sample.open_model(tmp_path / "model.ckpt")[0].cpu()
    x, free = again.to_fill(2, text=again.tokens["text"].encode(["the cat sat"] * 2))
    assert sample.read(again, batch()["image"])
    for a, b in zip(first.net(x, free, 0.).values(), again.net(x, free, 0.).values()):
        assert_close(a, b)


@pytest.mark.parametrize("trunk", ["blocks", "llama", "gpt2"])
def test_one_learning_rate_and_the_trunks_matrices_apart_from_its_tables(trunk):
    made = model(trunk, lr=1e-4) if trunk in FAMILIES else fudoki.Fudoki(
        {"image": [torch.rand(12, 4), 2, 6]}, lr=1e-4,
        trunk_options=dict(width=16, depth=1, heads=1))
    made.trainer = types.SimpleNamespace(estimated_stepping_batches=1)
    groups = made.configure_optimizers()[0][0].param_groups
    assert {group["initial_lr"] for group in groups} == {1e-4}
    names = {name: p for name, p in made.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    matrices, = [{*group["params"]} for group in groups if group["matrices"]]
    expected = {name for name, p in names.items() if ".trunk." in name and p.ndim == 2
                and not any(table in name for table in ("words", "embed_tokens", "wte", "wpe"))}
    assert {name for name, p in names.items() if p in matrices} == expected and expected


@pytest.mark.parametrize("what", ["row", "column"])
def test_a_backbone_learns_where_a_patch_is(what):
    """At first only its number counts; what the training adds knows its row and its column."""
    trunk, h = model().net.trunk, torch.randn(1, 9, 32)
    places = torch.stack([torch.arange(9) // 3, torch.arange(9) % 3], -1)
    other = places.clone()
    other[4, "row column".split().index(what)] += 1
    assert_close(trunk(h, places, None, None), trunk(h, other, None, None))
    torch.nn.init.normal_(trunk.place)
    assert (trunk(h, places, None, None) - trunk(h, other, None, None)).abs().max() > 1e-3


def test_bfloat16_works_with_a_mask():
    made, x = model(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = made.loss(x, made.mark_free(x, "image"))
    loss.backward()
    assert torch.isfinite(loss) and made.net.trunk.words.weight.grad.isfinite().all()


# ------------------------------------------------------------------------------------------- texts

def test_captions_of_a_language_models_tokenizer_end():
    text = fudoki.Text(tokenizer().to_str(), 12, 1)
    tokens = text.encode(["the cat sat on the mat", "a dog"])
    assert text.decode(tokens) == ["the cat sat on the mat", "a dog"]
    assert (tokens == 1).any(1).all() and tokens[1, -1] == 1
    part = fudoki.Text(tokenizer().to_str(), 12, window=True)
    assert part.encode(["a dog"]).tolist() == [[t for t in tokens[1].tolist() if t != 1]]


def characters(alphabet, length):
    return fudoki.Text(train.tokenizer(alphabet, characters=True), length, window=True)


@pytest.mark.parametrize("text, gaps, length", [
    ("abc ___", 4, 8), ("a___c", 3, 5), ("a____", 7, 8), ("___", 8, 8), ("a_b", 0, 3)])
def test_gaps(text, gaps, length):
    tokens = characters("abc _", 8).encode([text])
    assert tokens.shape == (1, length) and (tokens == -1).sum() == gaps


def test_characters_come_back_as_they_were():
    text = "Two words,\n\tand MORE? \u00e9"
    kind = characters(text, 30)
    assert kind.decode(kind.encode([text])) == [text] and kind.marks == ()


def test_a_gap_in_a_caption_is_a_word():
    words = fudoki.Text(train.tokenizer(["a", "dot", "red"], eos=["<end>"]), 5, 3)
    assert words.encode(["a ___ dot", "a ___ ___ dot", "a ___"]).tolist() == \
        [[0, -1, 1, 3, 3], [0, -1, -1, 1, 3], [0, -1, -1, -1, -1]]


def test_texts_that_cannot_be():
    for texts, says in ((["abx"], "a part of 'abx' is unknown"),
                        (["a" * 9], "9 tokens; 0 to 8 fit"),
                        (["___", "abc"], "have to be equally long")):
        with pytest.raises(ValueError, match=says):
            characters("abc", 8).encode(texts)


def test_all_padding_together_weighs_as_one_token():
    """Two captions of a batch: one has five tokens of padding, the other none."""
    words = [train.tokenizer(["a", "red", "dot"], eos=["<end>"]), 9, 3]
    made = fudoki.Fudoki({"text": words}, trunk_options=dict(width=16, depth=1, heads=1))
    x = {"text": made.tokens["text"].encode(["dot", "a red dot a red dot"])}
    weight = made.weight(x, made.mark_free(x, "text"))["text"]
    assert_close(weight, torch.tensor([[1 / 3, 1 / 3] + [1 / 15] * 5, [1 / 7] * 7]))
    given = made.mark_free(x)
    assert made.weight(x, given)["text"].sum() == 0


# ------------------------------------------------------------------------------------------ memory

class Largest(TorchDispatchMode):
    """Remembers the largest tensor that is made."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.size = max(self.size, math.prod(made.shape))
        return out


@pytest.mark.parametrize("step", [None, "race", "renoise", "euler"])
def test_a_large_vocabulary_takes_turns(step):
    """256 rows of 150,000 tokens would be 38 million numbers at once; CHUNK are allowed."""
    V, x = 150_000, torch.arange(256)[None]
    path = fudoki.MetricPath(torch.randn(V, 4))
    with Largest() as largest:
        out = corrupt(path, x, 0.5) if step is None else STEPS[step](path, x, x + 1, 0.4, 0.5)
    assert out.shape == x.shape and largest.size <= max(fudoki.CHUNK, path.embedding.numel())
