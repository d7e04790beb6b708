"""A run is resumed with its own data, and a refused run leaves nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import FLAGS, TINY

import train as command_line
from gpt import GPT
from tinygpt.data import load as module
from tinygpt.data.tokenizer import BPETokenizer, up_to_end
from train import train

pytestmark = pytest.mark.usefixtures("cache")


def test_a_resumed_run_refuses_other_data_of_the_same_tokenizer(config, tmp_path, without_samples):
    one, two = (list(range(10, 10 + n)) * 9 for n in (60, 61))
    result = train(GPT(TINY), replace(config, max_iters=3), np.array(one))
    again = replace(config, max_iters=4, resume=True)
    says = r"ids \(486 training.*is not the same data as an array of token ids \(494 training"
    with pytest.raises(ValueError, match=says) as caught:
        train(GPT(TINY), again, np.array(two))
    message = str(caught.value)
    assert message.startswith(str(result.last)) and message.count("fingerprint") == 2
    assert train(GPT(TINY), again, np.array(one, dtype=np.uint8)).iter_num == 4
    other = replace(again, eval_only=True, resume=False)  # evaluates any data
    assert np.isfinite(train(GPT(TINY), other, np.array(two)).val_loss)


def test_a_checkpoint_that_does_not_name_its_data_is_resumed(config, without_samples):
    ids = np.arange(500) % 200
    last = train(GPT(TINY), replace(config, max_iters=3), ids).last
    with safe_open(last, framework="numpy") as file:
        metadata = file.metadata()
    del metadata["xxh3_64"], metadata["xxh3_64_header"]  # they would not match
    assert json.loads(metadata.pop("data"))["training_tokens"] == 450
    for damaged in ([], {"fingerprint": "x"}, None):
        extra = {} if damaged is None else {"data": json.dumps(damaged)}
        save_file(load_file(last), last, metadata | extra)
        again = replace(config, max_iters=4, resume=True)
        if damaged is None:
            assert train(GPT(TINY), again, ids + 1).iter_num == 4
        else:
            with pytest.raises(ValueError, match="damaged metadata"):
                train(GPT(TINY), again, ids)


def test_a_resumed_run_keeps_its_tokenizer(tmp_path, text_file, capsys):
    (tmp_path / "out").mkdir()
    settings = {"tokenizer": "byte", "vocab_size": 256, "data": str(text_file)}
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    argv = ["--resume", "--tokenizer", "bpe", "--out_dir", str(tmp_path / "out")]
    assert command_line.main(argv) == 2
    assert "has tokenizer=byte, but tokenizer=bpe was asked for" in capsys.readouterr().err


def test_a_refused_command_leaves_no_cache(text_file, tmp_path, cache, capsys):
    flags = [*map(str, FLAGS), "--data", str(text_file), "--out_dir", str(tmp_path / "out")]
    assert command_line.main([*flags, "--freeze", "no.such.weight"]) == 2
    assert list(cache.iterdir()) == [] and "no.such.weight" in capsys.readouterr().err
    module.load_data(text_file, "byte", 256)
    assert command_line.main([*flags, "--freeze", "no.such.weight"]) == 2
    assert len(list(cache.iterdir())) == 1  # that of an earlier command stays


def test_up_to_end_yields_one_document():
    tokenizer = BPETokenizer.train("some text", 257)
    ids = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode("two")]
    assert tokenizer.decode(list(up_to_end(tokenizer, ids))) == "one"
