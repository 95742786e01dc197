"""A recipe file -> a `Recipe`, or every complaint it earns, each naming line, key, value and rule."""

import tracemalloc

import pytest

from moe_train.config import dump_recipe, load_recipe, parse_recipe
from moe_train.errors import ConfigError

GOOD = """\
model: {model_type: qwen3_moe}
optimizer: {lr: 1e-4}
data:
  corpora: [{text: python-stdlib}]
  sequence_length: 8
batch: {global_size: 4, micro_size: 2}
train: {steps: 3}
"""
"""Seven lines: what a test appends is line 8."""


@pytest.fixture
def load(tmp_path):
    def load(text: str, *overrides: str):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, overrides)

    return load


@pytest.fixture
def complaint(load, tmp_path):
    """The message for a bad recipe, its path shortened to `recipe.yaml`."""

    def complaint(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return complaint


def test_a_number_with_an_exponent_is_a_number(load):
    """PyYAML reads 1e-4 as text."""
    assert load(GOOD).optimizer.lr == 0.0001
    assert load(GOOD, "optimizer.lr=3e-4").optimizer.lr == 0.0003


WRONG = {
    "unknown key": ("optimiser: {lr: 1}", "recipe.yaml:8: unknown key optimiser; did you mean optimizer?"),
    "unknown nested": ("zero: {stagee: 1}", "recipe.yaml:8: unknown key zero.stagee; did you mean stage?"),
    "nothing near": ("zero: {qqq: 1}", "recipe.yaml:8: unknown key zero.qqq; legal keys here: offload, stage"),
    "on is text": ("on: no", "recipe.yaml:8: unknown key on; legal keys here: batch, checkpoint"),
    "number as key": ("3: 1", "recipe.yaml:8: unknown key 3; legal keys"),
    "duplicate": ("train: {steps: 4}", 'recipe.yaml:8:1: found duplicate key "train"'),
    "no section": ("zero:", "recipe.yaml:8: zero (None): must be a section, a mapping of keys"),
    "list for section": ("zero: [1]", "recipe.yaml:8: zero ([1]): must be a section, a mapping of keys"),
    "text for number": ("seed: '3'", "recipe.yaml:8: seed ('3'): input should be a valid integer"),
    "yes for number": ("seed: yes", "recipe.yaml:8: seed ('yes'): input should be a valid integer"),
    "true for number": ("seed: true", "recipe.yaml:8: seed (True): input should be a valid integer"),
    "fraction": ("seed: 3.5", "recipe.yaml:8: seed (3.5): input should be a valid integer"),
    "negative": ("seed: -1", "recipe.yaml:8: seed (-1): input should be greater than or equal to 0"),
    "out of range": ("zero: {stage: 4}", "recipe.yaml:8: zero.stage (4): input should be less than or equal to 3"),
    "true for a stage": ("zero: {stage: true}", "recipe.yaml:8: zero.stage (True): input should be a valid integer"),
    "text for a choice": (
        "precision: {compute: bf8}",
        "recipe.yaml:8: precision.compute ('bf8'): input should be 'fp32'",
    ),
    "text for bool": (
        "diagnostics: {load_picture: maybe}",
        "recipe.yaml:8: diagnostics.load_picture ('maybe'): input should be a valid boolean",
    ),
    "auto misspelt": (
        "parallel: {expert: two}",
        "recipe.yaml:8: parallel.expert ('two'): must be a whole number or auto",
    ),
    "EP 0": ("parallel: {expert: 0}", "recipe.yaml:8: parallel.expert (0) must be at least 1"),
    "world 0": ("world_sizes: [2, 0]", "recipe.yaml:8: world_sizes.1 (0): input should be greater than or equal to 1"),
    "nan": ("moe: {z_loss_coef: .nan}", "recipe.yaml:8: moe.z_loss_coef (nan): input should be a finite number"),
    "keep 1": (
        "checkpoint: {keep: 1}",
        "recipe.yaml:8: checkpoint.keep (1): input should be greater than or equal to 2",
    ),
    "offload without shards": (
        "zero: {stage: 0, offload: cpu}",
        "recipe.yaml:8: zero.offload (cpu) needs zero.stage of at",
    ),
    "bf16 gradients": (
        "precision: {compute: fp32, gradients: bf16}",
        "recipe.yaml:8: precision.gradients (bf16) needs precision.compute (bf16), not fp32",
    ),
    "fp16 at stage 0": (
        "zero: {stage: 0}\nprecision: {compute: fp16}",
        "recipe.yaml: precision.compute (fp16) needs zero.stage of at least 1",
    ),
    "warmup": (
        "schedule: {warmup_steps: 10}",
        "recipe.yaml: schedule.warmup_steps (10) must not exceed train.steps (3)",
    ),
    "tab": (
        "zero:\n\tstage: 1",
        "recipe.yaml:9:1: found character '\\t' that cannot start any token: indent with spaces",
    ),
    "unclosed": ("zero: {stage: 1", "recipe.yaml:9:1: "),
    "python object": (
        "seed: !!python/object/apply:os.system ['true']",
        "recipe.yaml:8: seed: the tag tag:yaml.org,2002:python/object/apply:os.system is refused",
    ),
    "own tag": ("seed: !mine 3", "recipe.yaml:8: seed: the tag !mine is refused; a recipe holds plain values"),
    "date": (
        "tracking: {name: 2020-01-01}",
        "recipe.yaml:8: tracking.name: a value of type date (2020-01-01) is refused",
    ),
    "no date": ("tracking: {name: 2020-13-45}", "recipe.yaml: month must be in 1..12"),
    "binary": ("seed: !!binary aGVsbG8=", "recipe.yaml:8: seed: a value of type bytes (b'hello') is refused"),
    "two documents": (f"---\n{GOOD}", "recipe.yaml:8:1: expected a single document in the stream but found another"),
    "control character": ("seed: \x00", "recipe.yaml: unacceptable character #x0000"),
    "deep": (f"deepspeed: {'[' * 1500}{']' * 1500}", "recipe.yaml: values nested deeper than 32 levels are refused"),
    "less deep": (
        f"deepspeed: {{a: {'[' * 40}{']' * 40}}}",
        "recipe.yaml: values nested deeper than 32 levels are refused",
    ),
    "endless number": (f"seed: {'9' * 6000}", "recipe.yaml: Exceeds the limit"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_text_is_refused_in_one_sentence(complaint, name):
    added, expected = WRONG[name]
    message = complaint(f"{GOOD}{added}\n")
    assert message.startswith(expected), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("other", "named"),
    [("zero: {stage: 3}", "zero.stage (3)"), ("parallel: {tensor: 2}", "parallel.tensor (2)")],
)
def test_compiled_attention_is_refused_where_ranks_talk_inside_it(complaint, load, other, named):
    assert load(GOOD, "model.compile=true").model.compile
    assert complaint(f"{GOOD}{other}\n", "model.compile=true") == (
        f"recipe.yaml: model.compile (true) does not go with {named}, which moves weights or partial sums between "
        "ranks in the middle of attention: leave one of them out"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), not an empty file"),
        (
            "# only a comment\n",
            "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), not an empty file",
        ),
        ("- 1\n- 2\n", "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), not a list"),
        ("hello\n", "recipe.yaml: a recipe is a mapping of sections (model:, data:, ...), not a str"),
    ],
)
def test_what_is_no_mapping_is_refused(complaint, text, expected):
    assert complaint(text) == expected


def test_all_problems_are_listed_at_once(complaint):
    text = GOOD.replace("lr: 1e-4", "lr: -1, betas: [1, 2, 3], eps: x").replace("micro_size: 2", "micro: 2")
    text = text.replace("{text: python-stdlib}", "{text: python-stdlib, wieght: 2}, {text: a, prefix: b}")
    assert complaint(text + "sead: 1\n").splitlines() == [
        "recipe.yaml:2: optimizer.lr (-1): input should be greater than 0",
        "recipe.yaml:2: optimizer.betas ([1, 2, 3]): tuple should have at most 2 items after validation, not 3",
        "recipe.yaml:2: optimizer.eps ('x'): input should be a valid number",
        "recipe.yaml:4: unknown key data.corpora.0.wieght; did you mean weight?",
        "recipe.yaml:4: a corpus sets exactly one of prefix and text",
        "recipe.yaml:6: batch.micro_size is required",
        "recipe.yaml:6: unknown key batch.micro; did you mean micro_size?",
        "recipe.yaml:8: unknown key sead; did you mean seed?",
    ]


def test_rules_across_sections_are_listed_at_once(complaint):
    added = "schedule: {warmup_steps: 10}\nzero: {stage: 0}\nprecision: {compute: fp16}\ndeepspeed: {optimizer: {}}\n"
    lines = complaint(GOOD + added).splitlines()
    assert [line.split()[1] for line in lines] == [
        "schedule.warmup_steps",
        "precision.compute",
        "deepspeed.optimizer",
    ]


@pytest.mark.parametrize(
    "text", ["model: {}", "model: {model_type: qwen3_moe, path: x}", "model: {path: x, weights: x}"]
)
def test_a_model_has_one_source(complaint, text):
    message = complaint(GOOD.replace("model: {model_type: qwen3_moe}", text))
    assert message == "recipe.yaml:1: set exactly one of model.model_type, model.path and model.weights"


def test_multiplying_aliases_are_refused_in_little_memory(complaint):
    levels = "".join(f"  b{i + 1}: &b{i + 1} [{', '.join([f'*b{i}'] * 10)}]\n" for i in range(9))
    tracemalloc.start()
    message = complaint(f"{GOOD}deepspeed:\n  b0: &b0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n{levels}")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == "recipe.yaml: more than 20000 values; aliases that multiply are refused"
    assert peak < 50e6  # written out they would be 10 billion values


def test_aliases_as_such_are_legal(load):
    recipe = load(f"{GOOD}deepspeed:\n  a: &a {{x: 1}}\n  b: *a\n")
    assert recipe.deepspeed == {"a": {"x": 1}, "b": {"x": 1}}


def test_large_files_are_refused_unread(tmp_path):
    path = tmp_path / "large.yaml"
    with path.open("wb") as stream:
        stream.truncate(50 * 1024 * 1024)
    with pytest.raises(ConfigError, match=r"52428800 bytes is no recipe \(limit 262144\)"):
        load_recipe(path)


def test_paths_that_are_no_text_files(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: the recipe does not exist; give the path of a YAML file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="the recipe is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml: not UTF-8 text \(.* at byte 6\)"):
        load_recipe(tmp_path / "latin.yaml")


OVERRIDES = {
    "optimizer.lr=3e-4": lambda r: r.optimizer.lr == 3e-4,
    "optimizer.betas=[0.8, 0.9]": lambda r: r.optimizer.betas == (0.8, 0.9),
    "model.config={hidden_size: 64, norm_topk_prob: true}": lambda r: (
        r.model.config == {"hidden_size": 64, "norm_topk_prob": True}
    ),
    "model.config.hidden_size=64": lambda r: r.model.config == {"hidden_size": 64},
    "data.corpora.0.weight=2": lambda r: r.data.corpora[0].weight == 2.0,
    "data.corpora.0={prefix: a}": lambda r: (r.data.corpora[0].prefix, r.data.corpora[0].text) == ("a", None),
    "data.corpora=[{prefix: a}, {prefix: b=c}]": lambda r: [c.prefix for c in r.data.corpora] == ["a", "b=c"],
    "tracking.name=a=b": lambda r: r.tracking.name == "a=b",
    "tracking.name=": lambda r: r.tracking.name is None,
    "tracking.name='3'": lambda r: r.tracking.name == "3",
    "diagnostics.load_picture=false": lambda r: r.diagnostics.load_picture is False,
    "world_sizes=[1, 2]": lambda r: r.world_sizes == (1, 2),
    "deepspeed.a.b.c=1": lambda r: r.deepspeed == {"a": {"b": {"c": 1}}},
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_set_changes_one_key(load, override):
    check = OVERRIDES[override]
    assert check(load(GOOD, override))
    assert not check(load(GOOD)) or override == "tracking.name="


def test_the_last_set_wins(load):
    assert load(GOOD, "seed=1", "seed=2").seed == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr", "--set optimizer.lr: write it as dotted.key=value, for example --set optimizer.lr=3e-4"),
        ("=3", "--set =3: write it as dotted.key=value"),
        ("optimizer..lr=3", "--set optimizer..lr=3: write it as dotted.key=value"),
        ("optimizer.lr =3", "--set optimizer.lr =3: write it as dotted.key=value"),
        ("seed=[1", "--set seed=[1:"),
        ("seed=x", "--set seed=x: seed ('x'): input should be a valid integer"),
        ("train.steps=0", "--set train.steps=0: train.steps (0): input should be greater than or equal to 1"),
        ("optimizer.rl=1", "--set optimizer.rl=1: unknown key optimizer.rl; "),
        ("optimizer.lr.x=1", "--set optimizer.lr.x=1: optimizer.lr is a value, not a section"),
        (
            "data.corpora.1.weight=2",
            "--set data.corpora.1.weight=2: data.corpora has 1 entries; name one by its number",
        ),
        ("data.corpora.1=2", "--set data.corpora.1=2: data.corpora has 1 entries; name one by its number"),
        ("data.corpora.first.weight=2", "--set data.corpora.first.weight=2: data.corpora has 1 entries"),
        ("seed=!!python/name:os.system x", "--set seed=!!python/name:os.system x: the tag"),
        ("data.corpora=[]", "--set data.corpora=[]: data.corpora ([]): tuple should have at least 1 item"),
    ],
)
def test_bad_set_is_refused_by_its_own_text(complaint, override, expected):
    message = complaint(GOOD, override)
    assert message.startswith(expected), message
    assert "\n" not in message


def test_resolved_recipe_reads_back_equal(load, tmp_path):
    recipe = load(
        GOOD,
        "optimizer.betas=[0.8, 0.99]",
        "optimizer.lr=1e-5",
        "world_sizes=[1, 2]",
        "model.config={rope_theta: 1e6, hidden_act: silu, x: [1, null, true]}",
        "deepspeed={zero_optimization: {reduce_bucket_size: 1000}}",
        "tracking.tags=[a, '1']",
        "tracking.name=on",
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe
    assert dump_recipe(load_recipe(path)) == dump_recipe(recipe)


def test_parse_without_a_file_names_the_source():
    with pytest.raises(ConfigError, match="recipe: model is required"):
        parse_recipe({})
