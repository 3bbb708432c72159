"""Settings: what makes no sense, fits nothing or is no YAML is refused by name, before anything is loaded."""

import pytest
import torch


@pytest.fixture
def refused(recipe, capsys):
    """What the recipe says of a command that it refuses."""

    def run(*argv):
        with pytest.raises(SystemExit) as error:
            recipe("train").parse_settings(list(argv))
        assert error.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--lr -1", "lr must be at least 0, got -1.0"),
        ("--lr nan", "lr must be at least 0, got nan"),
        ("--weight-decay inf", "weight_decay must be at least 0, got inf"),
        ("--flip 1.5", "flip must be at least 0 and at most 1, got 1.5"),
        ("--warmup -0.1", "warmup must be at least 0 and at most 1"),
        ("--random-crop 0.5", "random_crop must be at least 1, got 0.5"),
        ("--epochs -1", "epochs must be at least 0, got -1"),
        ("--clips 0", "clips must be at least 1, got 0"),
        ("--frames-per-batch 0", "frames_per_batch must be at least 1"),
        ("--workers -1", "workers must be at least 0"),
        ("--clip-length 2.5", "invalid int value: '2.5'"),
        ("--size 256x0", "HEIGHTxWIDTH"),
        ("--split -1", "split must be a number or all"),
        ("--split one", "split must be a number or all"),
        ("--device gpu", "--device must be auto, cpu, cuda or cuda:<number>"),
        ("--lr-factors aggregator=-1", "lr_factors must be numbers of at least 0, got aggregator=-1"),
        ("--lr-factors aggregator=fast", "got aggregator='fast'"),
        ("--model-options quality=[", "takes KEY=VALUE, the values in YAML"),
        ("--optimizer sgd --momentum 0", "nesterov needs a momentum above 0"),
        ("--optimizer sgd --momentum 1", "momentum must be at least 0 and at most 0.9999, got 1.0"),
        ("--seed 99999999999999999999", "seed must be at least 0 and at most"),
        ("--flow-root /nowhere", "flow_root: there is no folder /nowhere"),
        ("--schedule step", "needs step_epochs or step_milestones"),
        ("--schedule step --step-milestones 0", "step_milestones must be at least 1, got 0"),
        ("--data mars:/a --root /b", "data says where the data set lies, mars:/a, and root again: /b"),
        ("--model mean_resnet10t,mean_resnet10t", "model must be names by comma, each once"),
        ("--pretrained --backbone-pretrained", "pretrained is the whole model's weights"),
        ("--backbone-weights a --backbone-pretrained", "both name the backbone's weights"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(refused, argv, message):
    assert message in refused(*argv.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1,", "is no valid YAML"),
        (b"- a", "must hold settings by name, such as 'epochs: 60'; got a list"),
        (b"lr: \xe9", "is not UTF-8 text"),
        (b"base: own.yaml", "is its own base"),
        (b"base: 5", "base must be the name of a file, got 5"),
        (b"lr: !!python/none", "is no valid YAML"),
        (b"lr: 1\nseed: 2\nlr: 3", "'lr' stands there twice"),
        (b"data_options: {size: 1, size: 2}", "'size' stands there twice"),
        (b"epochs: 1_0", "'1_0' is no number that everybody reads alike"),
        (b"lr: 1_0.5", "'1_0.5' is no number"),
        (b"epochs: 010", "'010' is no number that everybody reads alike"),
        (b"epochs: 1:30", "'1:30' is no number that everybody reads alike"),
        (b"lr: 1:30.5", "'1:30.5' is no number that everybody reads alike"),
        (b"epochs: " + b"9" * 5000, "9' is no number that everybody reads alike"),
        (b"epoch: 3", "unknown setting 'epoch'; did you mean 'epochs'?"),
        (b"clip_length: 2.5", "clip_length must be int, got 2.5"),
        (b"flip: true", "flip must be float, got True"),
        (b"datasets: [mars]", "datasets must hold settings by the name of a data set"),
        (b"datasets: {marz: {}}", "did you mean 'mars'"),
        (b"datasets: {mars: {epoch: 3}}", "unknown setting 'epoch'"),
    ],
)
def test_a_config_that_is_none_is_named(refused, tmp_path, content, message):
    file = tmp_path / "own.yaml"
    file.write_bytes(content)
    said = refused("--config", str(file))
    assert message in said
    assert "own.yaml" in said


def test_a_config_may_begin_with_a_byte_order_mark_and_bases_may_chain(recipe, tmp_path):
    (tmp_path / "a.yaml").write_bytes("lr: 0.5\nepochs: 3\n".encode("utf-8-sig"))
    (tmp_path / "b.yaml").write_bytes("base: a.yaml\nepochs: 4\n".encode("utf-16"))
    (tmp_path / "c.yaml").write_text("base: b.yaml\nseed: 5\n")
    settings = recipe("train").parse_settings(["--config", str(tmp_path / "c.yaml")])
    assert (settings.lr, settings.epochs, settings.seed) == (0.5, 4, 5)


def test_numbers_may_have_an_exponent_without_a_point(recipe, tmp_path):
    """YAML itself takes 1e-3 for text."""
    (tmp_path / "a.yaml").write_text(
        "<<: {lr: 2, seed: 0}\nlr: 1e-3\nweight_decay: 5.e+1\nlr_factors: {encoder: 2E2}\nname: 1e3x\n"
    )
    command = ["--config", str(tmp_path / "a.yaml"), "--criterion-options", "margin=3e-1", "mining=hard"]
    settings = recipe("train").parse_settings(command)
    assert (settings.lr, settings.weight_decay, settings.lr_factors) == (1e-3, 50.0, {"encoder": 200.0})
    assert (settings.criterion_options, settings.name) == ({"margin": 0.3, "mining": "hard"}, "1e3x")


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        *((f"{key}: x", f"sets {key}, which holds for the whole run") for key in ("data", "out", "mixed_precision")),
        ("device: cpu", "sets device, which holds for the whole run"),
        ("identity_splits: 2", "sets identity_splits, which holds for the whole run"),
        ("stages: []", "sets stages"),
        ("lr: -1", "lr must be at least 0"),
        ("epoch: 3", "unknown setting 'epoch'"),
        ("model: 'a_b,c_d'", "takes one model"),
    ],
)
def test_a_stage_sets_what_it_can(refused, tmp_path, stage, message):
    file = tmp_path / "own.yaml"
    file.write_text(f"stages:\n  - {{}}\n  - {{{stage}}}\n")
    said = refused("--config", str(file))
    assert "stages[1]" in said
    assert message in said


def test_every_stage_trains_the_model_that_it_names(recipe, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: mean_resnet10t\nlr: 0.5\nstages: [{model: max_resnet10t}, {lr: 0.25}, {model: gem_resnet10t}]\n"
    )
    settings = recipe("train").parse_settings(["--config", str(file)])
    stages = recipe("settings").stages_of("mean_resnet10t", settings)
    assert [stage.model for stage in stages] == ["max_resnet10t", "mean_resnet10t", "gem_resnet10t"]
    assert [stage.lr for stage in stages] == [0.5, 0.25, 0.5]


TINY = ["--size", "32x16", "--device", "cpu", "--data", "folder:nowhere"]  # no data are opened


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model grl_resnet10t --clips 3", "needs --sampler pairs, or identity with an even number of clips"),
        ("--model grl_resnet10t --sampler tracklets", "needs --sampler pairs"),
        ("--model grl_resnet10t --clips 4", "no folder nowhere"),
        ("--model grl_resnet10t --sampler pairs", "no folder nowhere"),
        ("--model mean_resnet10t --clips 3", "no folder nowhere"),
        ("--model mean_resnet10t --lr-factors agregator=0.1", "the model has no module agregator; did you mean"),
        ("--model mean_resnet10t --lr-factors encoder.backbone.conv=0.1", "no module encoder.backbone.conv;"),
        ("--model mean_resnet10t --lr-factors encoder.backbone.conv1=0.1", "no folder nowhere"),
        ("--model mean_resnet10t --criterion basline", "did you mean 'baseline'"),
        ("--model mean_resnet10t --criterion-options margn=1", "no option margn"),
        ("--model mean_resnet10t --init nowhere", "init: nowhere is no run directory with a trained model"),
    ],
)
def test_what_does_not_fit_shows_before_data_are_opened(recipe, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        recipe("train").main([*TINY, *argv.split(), "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_callers_default_type_and_device_do_not_matter(recipe):
    """Nor are they changed: a notebook's are its own."""
    common = recipe("common")
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        with common.own_defaults():
            assert (torch.ones(1).dtype, torch.ones(1).device.type) == (torch.float32, "cpu")
        assert (torch.ones(1).dtype, torch.ones(1).device.type) == (torch.float64, "meta")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for name in ("train", "evaluate"):
        assert hasattr(recipe(name).main, "__wrapped__"), "it has the caller's defaults"
