import re
from pathlib import Path

import pytest

from retnet.train.recipe import DEFAULTS, load_recipe
from tests.paths import ROOT

STACK = str(ROOT / "recipes" / "llama-125m.yml")


def test_arguments_set_fields_of_recipes_and_of_the_trainer():
    recipe = load_recipe(None, ["model=retnet-tiny", "data=stdlib", "length=64", "learning_rate=3e-4", "max_steps=7"])
    assert (recipe.model, recipe.data, recipe.length) == ("retnet-tiny", "stdlib", 64)
    arguments = recipe.training_arguments()
    assert (arguments.learning_rate, arguments.max_steps) == (3e-4, 7)
    assert arguments.weight_decay == DEFAULTS["weight_decay"]
    assert arguments.output_dir == "out/retnet-tiny"


def test_arguments_override_the_file(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: retnet-tiny\ndata: some/folder\nlearning_rate: 3e-3\neval_strategy: no\nmax_steps: 5\n")
    recipe = load_recipe(file, ["max_steps=9"], data="stdlib")
    assert recipe.data == "stdlib"
    assert recipe.training["max_steps"] == 9
    assert recipe.training["learning_rate"] == 3e-3
    assert recipe.training["eval_strategy"] == "no"


def test_arguments_may_be_yaml_lists_mappings_and_booleans():
    words = ["model=m", "data=d", "do_eval=false", "lr_scheduler_kwargs={num_cycles: 2}", "eval_strategy=no"]
    training = load_recipe(None, words).training
    assert training["do_eval"] is False
    assert training["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert training["eval_strategy"] == "no"


def test_all_mistakes_are_reported_at_once_with_the_nearest_keys():
    with pytest.raises(ValueError, match="unknown key 'learning_rat'") as error:
        load_recipe(None, ["learning_rat=1", "lenght=3", "max_steps=many", "model=m"])
    message = str(error.value)
    assert "did you mean 'learning_rate'?" in message
    assert "did you mean 'length'?" in message
    assert "max_steps is 'many'" in message
    assert "data is missing" in message


@pytest.mark.parametrize("word", ["length=1", "valid_fraction=1.5", "length=many"])
def test_fields_of_recipes_are_validated(word):
    with pytest.raises(ValueError, match=word.split("=")[0]):
        load_recipe(None, ["model=m", "data=d", word])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("a: [1,\n", "is not a recipe: this is not YAML .* \\(line 2, column 1\\)"),
        ("just text", "holds text; accepted: a mapping"),
        ("length: 64\nmodel: m\nlength: 32\n", "the key 'length' is given twice \\(line 3, column 1\\)"),
        ("model: m\ndata: {a: 1, b: 2, a: 3}\n", "the key 'a' is given twice \\(line 2"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 1\n", "the key 'a' is given twice \\(line 3"),
        ("model: !!python/object/apply:os.system [ls]\n", "has no meaning here"),
        ("2: 3\n", "the key '2' is not text"),
        ("a: &a [1]\nb: [*a, *a, {c: *a, d: &d [*a, *d]}]\n", "an alias is inside the value that it repeats"),
        ("a: " + "x" * 300_000, "has 300003 bytes; accepted: a recipe of at most"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_with_the_reason(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(file)


def test_a_missing_file_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such recipe: .*gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml")


@pytest.mark.parametrize("word", ["=3", "length"])
def test_an_argument_that_is_not_a_setting_is_refused(word):
    with pytest.raises(ValueError, match="accepted: key=value"):
        load_recipe(None, [word])


def test_data_may_be_several_sources_with_weights(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\ndata:\n  books: 3\n  code: 0.5\n")
    assert load_recipe(file).weights == {"books": 3.0, "code": 0.5}
    assert load_recipe(file, ["data={wiki: 1, books: 2}"]).weights == {"wiki": 1.0, "books": 2.0}
    assert load_recipe(file, data="stdlib").weights == {"stdlib": 1.0}
    for word in ("{books: 0}", "{}", "{books: x}", "{books}", "{'': 1}"):
        with pytest.raises(ValueError, match=r"^data is .*; accepted: a source, or sources with shares above 0$"):
            load_recipe(file, [f"data={word}"])


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("resume_from_checkpoint", "auto", "auto"),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "out/checkpoint-3", "out/checkpoint-3"),
        ("fsdp", "true", True),
        ("fsdp_config", "{state_dict_type: SHARDED_STATE_DICT}", {"state_dict_type": "SHARDED_STATE_DICT"}),
    ],
)
def test_fields_accept_more_types_than_they_declare(key, word, value):
    assert load_recipe(None, ["model=m", "data=d", f"{key}={word}"]).training[key] == value


def test_blocks_are_compiled_and_not_the_whole_model():
    recipe = load_recipe(None, ["model=m", "data=d", "torch_compile=true", "torch_compile_mode=max-autotune"])
    assert recipe.compile_options == {"mode": "max-autotune"}
    assert not recipe.training_arguments().torch_compile
    assert load_recipe(None, ["model=m", "data=d", "torch_compile_backend=eager"]).compile_options == {
        "backend": "eager"
    }
    assert load_recipe(None, ["model=m", "data=d"]).compile_options is None


@pytest.mark.parametrize("word", ["log_level=loud", "ddp_backend=foo", "dataloader_multiprocessing_context=thread"])
def test_a_word_that_is_none_of_the_choices_is_refused_with_them(word):
    key, value = word.split("=")
    with pytest.raises(ValueError, match=rf"^{key} is '{value}'; accepted: \w+, "):
        load_recipe(None, ["model=m", "data=d", word])


def test_a_setting_without_effect_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="dataloader_drop_last is not accepted: no row is left out"):
        load_recipe(None, ["model=m", "data=d", "dataloader_drop_last=true"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("per_device_train_batch_size=0", "per_device_train_batch_size is 0; accepted: 1 or more"),
        ("per_device_eval_batch_size=-2", "per_device_eval_batch_size is -2; accepted: 1 or more"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps is 0; accepted: 1 or more"),
        ("max_steps=0", "max_steps is 0; accepted: 1 or more, or -1 for no limit"),
        ("num_train_epochs=-1", "num_train_epochs is -1.0; accepted: a number above 0"),
        ("metric_for_best_model=foo", "metric_for_best_model is 'foo'; accepted: eval_loss, eval_perplexity"),
        (
            "load_best_model_at_end=true",
            "load_best_model_at_end is True without validation; accepted: False",
        ),
        ("torch_compile_mode=foo", "torch_compile_mode is 'foo'; accepted: default"),
        ("torch_compile_backend=foo", "torch_compile_backend is 'foo'; accepted: .*inductor"),
        ("lr_scheduler_kwargs={a", "lr_scheduler_kwargs is '{a', which starts like YAML but cannot be read"),
        ("lr_scheduler_kwargs={a: 1, a: 2}", "cannot be read: the key 'a' is given twice"),
        ("data={a: 1", "data is '{a: 1', which starts like YAML but cannot be read"),
        ("data={a: 1, a: 2}", "cannot be read: the key 'a' is given twice"),
        ("data=", r"data is .*; accepted: a source, or sources with shares above 0"),
        ("data={'': 1}", r"data is .*; accepted: a source, or sources with shares above 0"),
        ("valid=", "valid is '': String should have at least 1 character"),
        ("output_dir=", "output_dir is empty; accepted: a folder"),
        ("num_train_epochs=nan", "num_train_epochs is nan; accepted: a finite number"),
        ("learning_rate=inf", "learning_rate is inf; accepted: a finite number"),
        ("max_minutes=inf", "max_minutes is 'inf': Input should be a finite number"),
        ("learning_rate=-1", "learning_rate is -1.0; accepted: 0 or more"),
        ("max_grad_norm=-1", "max_grad_norm is -1.0; accepted: 0 or more"),
        ("save_total_limit=-1", "save_total_limit is -1; accepted: 1 or more, or 0 for no limit"),
        ("eval_steps=0", "eval_steps is 0.0; accepted: a number above 0"),
        ("save_only_model=true", "save_only_model is not accepted: a checkpoint must be complete"),
        ("do_train=false", "do_train is not accepted: this command trains"),
        ("recompute=lite", "recompute is 'lite': Input should be 'none', 'light', 'medium' or 'layer'"),
        ("{recompute: light, gradient_checkpointing: true}", "recompute is 'light' with gradient_checkpointing true"),
        ("{recompute: medium, offload: true}", "offload is True with recompute 'medium'; accepted with offload"),
        ("output_dir=m", "output_dir is m, the folder of the model; accepted: another"),
    ],
)
def test_settings_that_would_fail_late_or_have_no_effect_are_refused(word, message):
    several = [f"{key}={value}" for key, value in re.findall(r"(\w+): (\w+)", word)] if word[0] == "{" else [word]
    words = ["model=m", word] if word.startswith("data=") else ["model=m", "data=d", *several]
    with pytest.raises(ValueError, match=message):
        load_recipe(None, words)


@pytest.mark.parametrize("words", [["length=3", "length=4"], ["length=3", "length=3"], ["data=d"]], ids=str)
def test_a_setting_that_is_given_twice_is_refused(words):
    with pytest.raises(ValueError, match=f"{words[0].split('=')[0]} is given twice"):
        load_recipe(None, ["model=m", *words], data="d")


@pytest.mark.parametrize("number", ["1e-4", "1E-4", "1.e-4", "+.1e-3", "0.1e-03", "1.0e-4"])
def test_numbers_in_mappings_and_lists_of_a_recipe_are_numbers(tmp_path, number):
    """YAML 1.1 reads most of these as text."""
    file = tmp_path / "recipe.yaml"
    file.write_text(f"model: m\ndata: {{a: {number}}}\nlr_scheduler_kwargs:\n  min_lr: {number}\n  b: [{number}]\n")
    words = ["model=m", f"data={{a: {number}}}", f"lr_scheduler_kwargs={{min_lr: {number}, b: [{number}]}}"]
    for recipe in (load_recipe(file), load_recipe(None, words)):
        assert recipe.data == {"a": 1e-4}
        assert recipe.training["lr_scheduler_kwargs"] == {"min_lr": 1e-4, "b": [1e-4]}


def test_text_that_looks_like_yaml_is_text_where_no_list_or_mapping_is_accepted():
    recipe = load_recipe(None, ["model=m", "data=[a].txt", "output_dir=[b]", "run_name={c", "valid={d}"])
    assert (recipe.data, recipe.training["output_dir"], recipe.training["run_name"]) == ("[a].txt", "[b]", "{c")


@pytest.mark.parametrize(
    ("model", "folder"), [("retnet-1.3b", "retnet-1.3b"), (STACK, "llama-125m"), ("some/trained", "trained")]
)
def test_the_default_output_folder_is_named_after_the_model(model, folder):
    assert load_recipe(None, ["data=d"], model=model).training["output_dir"] == str(Path("out") / folder)


def test_the_defaults_in_the_docs_are_those_of_a_run():
    page = (ROOT / "docs/do/train.md").read_text()
    table = page[page.index("| key | default |") :].partition("\n\n")[0]
    recipe = load_recipe(None, ["model=retnet-tiny", "data=stdlib"])
    arguments = recipe.training_arguments()
    rows = [[cell.strip(" `") for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    assert len(rows) > 10
    for key, said in rows:
        value = getattr(recipe, key) if hasattr(recipe, key) else getattr(arguments, key)
        assert said in (str(getattr(value, "value", value)), f"{value:g}" if isinstance(value, float) else ""), key
