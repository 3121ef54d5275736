"""Files from strangers: each is fine, or an error of the pack told in a second and in 64 MB."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ideogram4_quant.checkpoint import open_checkpoint, open_encoder
from ideogram4_quant.checkpoint.loras import parse_lora, read_lora
from ideogram4_quant.checkpoint.tensor_files import open_tensor_files
from ideogram4_quant.engine.compare.cases import read_cases
from ideogram4_quant.errors import CheckpointError, CorruptFileError, Ideogram4QuantError
from ideogram4_quant.gguf_loader import read_header
from ideogram4_quant.ops.tuning import choice_files
from ideogram4_quant.quant import Calibration
from ideogram4_quant.tests import hostile_files as hostile
from ideogram4_quant.tests.fuzz import seeds, targets
from ideogram4_quant.tests.timing import cpu_seconds

FINDINGS = Path(__file__).parent / "fuzz" / "findings"
CORPUS = Path(__file__).parent / "fuzz" / "corpus"
SECONDS, MEGABYTES = targets.SECONDS, targets.MEGABYTES


def cost(function: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, MB of resident memory above what there was before) of a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _resident("VmRSS"), time.thread_time()
    function()
    return time.thread_time() - start, (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    targets.write_neighbours(folder)
    return folder


def refused(open_file: Callable[[Path], object], path: Path, case: hostile.Case) -> str | None:
    """None if the file is refused as promised, else what went wrong."""
    caught: list[BaseException] = []

    def attempt() -> None:
        try:
            open_file(path)
        except Exception as error:
            caught.append(error)

    seconds, megabytes = cost(attempt)
    if not caught:
        return f"{case.name}: opened"
    error = caught[0]
    if not isinstance(error, CheckpointError):
        return f"{case.name}: {error!r}"
    if error.file != str(path) or (case.tensor and error.tensor != case.tensor):
        return f"{case.name}: names {error.file} and {error.tensor}"
    if len(str(error)) > 5000:
        return f"{case.name}: a message of {len(str(error))} characters"
    if seconds > SECONDS:
        seconds = cpu_seconds(attempt, SECONDS)
    if seconds > SECONDS or megabytes > MEGABYTES:
        return f"{case.name}: {seconds:.2f} s and {megabytes:.0f} MB"
    return None


MODELS = (open_checkpoint, open_encoder, read_lora)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does"
)
@pytest.mark.parametrize(
    ("suffix", "cases", "openers"),
    [
        (".safetensors", hostile.safetensors_cases, (*MODELS, Calibration.load)),
        (".gguf", hostile.gguf_cases, MODELS),
    ],
)
def test_every_case_is_refused(tmp_path: Path, suffix: str, cases, openers):
    problems, count = [], 0
    for case in cases():
        path = case.write(tmp_path / f"m{suffix}")
        chosen = openers if len(case.content) < 1 << 20 else openers[:1]
        problems += [refused(open_file, path, case) for open_file in chosen]
        count += 1
    assert [problem for problem in problems if problem] == []
    assert count > 150


def test_the_cases_start_from_good_files(tmp_path: Path):
    """What the corpus varies is fine before."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(hostile.safetensors(hostile._entry()))
    assert set(open_tensor_files(path).tensors) == {hostile.NAME, "other"}
    path = tmp_path / "m.gguf"
    path.write_bytes(hostile.gguf([hostile.info()], [hostile.entry(8, hostile.text(b"x"))]))
    assert set(read_header(path).tensors) == {"t"}


def test_every_place_of_a_gguf_header(folder: Path, tmp_path: Path):
    good = seeds.gguf(tmp_path / "good.gguf")
    header = good.read_bytes()[: read_header(good).data_offset][:700]
    rest = good.read_bytes()[len(header) :]
    number = bytes([targets.number("gguf")])
    found = {targets.run(number + h + rest, folder) for h in hostile.field_mutations(header)}
    assert found == {None}


@pytest.mark.parametrize("kind", ["int8", "nf4", "calibration"])
def test_every_value_of_a_safetensors_header(folder: Path, tmp_path: Path, kind: str):
    if kind == "calibration":
        path = seeds.calibration(tmp_path / "calibration.safetensors")
    else:
        path = seeds.write_all(tmp_path)[kind]
    header, data = targets.split(path)
    number = bytes([targets.number("calibration" if kind == "calibration" else "header")])
    found = {
        targets.run(number + targets.join(changed, data), folder)
        for changed in hostile.value_mutations(header)
    }
    assert found == {None}


@pytest.mark.parametrize("place", sorted({*FINDINGS.glob("*.bin"), *CORPUS.glob("*")}), ids=str)
def test_what_the_fuzzer_found_and_kept(folder: Path, place: Path):
    assert targets.run(place.read_bytes(), folder) is None


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> list[bytes]:
    return list(seeds.inputs(tmp_path_factory.mktemp("seeds")).values())


# target -> whether a file is what it should be, where it is none of a model
NO_MODELS: dict[str, Callable[[Path], object]] = {
    "choices": lambda folder: len(choice_files.load(folder, torch.device("cpu"))) == 1,
    "unfinished": lambda path: targets.resume(path).finished == {"first"},
    "prompts": lambda path: read_cases(path, seeds=(), width=64, height=64)[0].text == "sign",
}


def test_the_seeds_are_good(tmp_path: Path, first: list[bytes]):
    """Else the fuzzer would look at nothing but refusals."""
    for number, data in enumerate(first):
        name, build, _ = targets.TARGETS[data[0]]
        alone = tmp_path / str(number)  # a text encoder's config.json beside it would be read too
        alone.mkdir()
        targets.write_neighbours(alone)
        path = build(data[1:], alone)
        if name in NO_MODELS:
            assert NO_MODELS[name](path), name
            continue
        read = []
        for load in (
            lambda p: open_checkpoint(p).load("conditional"),
            lambda p: open_encoder(p).load(),
            lambda p: parse_lora(read_lora(p), targets.LORA_SHAPES, str(p)),
            Calibration.load,
        ):
            with suppress(Ideogram4QuantError):
                read.append(load(path))
        assert len(read) == 1, name


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_mutated_files_are_refused_or_fine(folder: Path, first: list[bytes], data: st.DataObject):
    content = bytearray(data.draw(st.sampled_from(first)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(1, len(content)))
        size = data.draw(st.sampled_from([0, 1, 8, 64]))
        token = data.draw(st.one_of(st.sampled_from(_TOKENS), st.binary(max_size=8)))
        content[at : at + size] = token
    assert targets.run(bytes(content), folder) is None


_TOKENS = (
    *(struct.pack("<Q", value) for value in (0, 1, *hostile.HUGE)),
    *(b"[", b"{", b'"', b"]", b"}", b",", b"null", b"-1", b"1e999", b"9223372036854775808"),
    *(b'"BF16"', b'"I8"', b'"U8"', b'"F64"', b'"F4"', b"\\ud800", b"\xff", b"../"),
)


# --- what is said ---------------------------------------------------------------------------------


def test_messages_can_be_printed_and_read(tmp_path: Path):
    """Control characters of a name do not reach the terminal, nor four megabytes the log."""
    name = "\x1b[2J\n\r" + "x" * 1_000_000
    path = tmp_path / "m.safetensors"
    path.write_bytes(hostile.safetensors({name: {"dtype": "F7"}}))
    with pytest.raises(CorruptFileError) as caught:
        open_tensor_files(path)
    said = str(caught.value)
    assert caught.value.tensor == name
    assert said.isprintable()
    assert len(said) < 1000
    assert r"\x1b[2J\n\r" in said
