"""The commands about time: `profile` this machine, `plan` a restore, `simulate` the paper."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hcache_rag.cli.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    StoreOption,
    check_device,
    err,
    one_of,
    out,
    picture,
    print_json,
    quiet_transformers,
    reported,
    say,
    size,
    status,
    writing,
)
from hcache_rag.errors import ProfileError
from hcache_rag.layout import STORAGE_DTYPES, Representation

if TYPE_CHECKING:
    from hcache_rag.choice import Objective
    from hcache_rag.profile import HardwareProfile
    from hcache_rag.simulate import Method
    from hcache_rag.spec import ModelSpec

HIDDEN, KV = Representation.HIDDEN, Representation.KV
_MAX_TOKENS = 10_000_000
_HARDWARE_HELP = "A preset (--list), a profile's JSON file, or 'this' for what `profile` measured."
_MODEL_HELP = "A named model (--list) or a folder. (default: SmolLM2-135M-Instruct)"


@reported
def profile(
    store: StoreOption = DEFAULT_STORE,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a model. (default: the store's, or SmolLM2-135M-Instruct)"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto.")] = "float32",
    device: DeviceOption = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller samples.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure this machine for a model and a store, and keep the result beside the states."""
    one_of("--dtype", dtype, ("float32", "bfloat16", "auto"))
    check_device(device)
    with quiet_transformers(), status("loading the model", not as_json) as update:
        from hcache_rag.choice import choose_layout
        from hcache_rag.llama_index.folder import measure_machine
        from hcache_rag.models import bfloat16_speedup, device_named

        measured, path = measure_machine(
            store.expanduser(),
            model,
            dtype,
            quick=quick,
            device=device,
            on_step=lambda step: update(f"timing {step}"),
        )
        is_on_cpu = device_named(device).type == "cpu"
        speedup = bfloat16_speedup() if is_on_cpu else None
    if as_json:
        result = {"path": str(path), "profile": asdict(measured), "bfloat16_speedup": speedup}
        print_json(result)
        return
    spec, costs = measured.model, measured.costs
    if spec is None or costs is None:
        raise ProfileError("nothing was measured")
    table = Table("reading from the store, a request of", "cold", "warm", box=None)
    cold, warm = (measured.samples[f"{name}_read (bytes, s)"] for name in ("cold", "warm"))
    for (num_bytes, cold_s), (_, warm_s) in zip(cold, warm, strict=True):
        table.add_row(
            size(num_bytes), f"{size(num_bytes / cold_s)}/s", f"{size(num_bytes / warm_s)}/s"
        )
    out.print(table)
    table = Table("one layer of the model", *(f"{n} tokens" for n in (64, 256, 1024)), box=None)
    rows = {
        **{f"restore hidden states ({dtype})": cost for dtype, cost in costs.project.items()},
        **{f"restore K and V ({dtype})": cost for dtype, cost in costs.scatter.items()},
        "read the tokens afresh": costs.layer,
    }
    for name, cost in rows.items():
        table.add_row(name, *(f"{cost(tokens) * 1e3:.2f} ms" for tokens in (64, 256, 1024)))
    out.print(table)
    say(out, "best mix: ", "bold", _mix_in_words(choose_layout(spec, measured)))
    if speedup is not None:
        say(out, "computing in bfloat16: ", "bold", _advice(speedup))
    say(out, "kept in ", "", str(path))


@reported
def plan(
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    tokens: Annotated[
        int, typer.Option(min=1, max=_MAX_TOKENS, help="Tokens of all documents.")
    ] = 2048,
    documents: Annotated[int, typer.Option(min=1, help="How many documents they are in.")] = 4,
    fresh: Annotated[
        int,
        typer.Option(min=0, max=_MAX_TOKENS, help="Tokens read now: the question, and repair."),
    ] = 32,
    hardware: Annotated[str, typer.Option(help=_HARDWARE_HELP)] = "this",
    objective: Annotated[
        str, typer.Option(help="time, bytes, or least time within so many bytes a token.")
    ] = "time",
    hidden_dtype: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(STORAGE_DTYPES[HIDDEN])}. (default: int8-smooth)"),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help=f"{', '.join(STORAGE_DTYPES[KV])}. (default: int8)")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    draw: Annotated[
        Path | None, typer.Option(help="Draw the two lanes of every method into a PNG.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the plan's timeline for Perfetto (ui.perfetto.dev).")
    ] = None,
    show_list: Annotated[
        bool, typer.Option("--list", help="Show the named models and hardware, and end.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Choose what to keep and what to recompute for a model on a machine, and predict the time."""
    from hcache_rag.choice import Prompt, choose_layout
    from hcache_rag.simulate import methods, questions_to_break_even

    if show_list:
        _show_list()
        return
    if documents > tokens:
        raise typer.BadParameter(
            f"{documents} documents of {tokens} tokens", param_hint="--documents"
        )
    _check_model(model)
    machine, path = _hardware(hardware, store.expanduser())
    spec = _spec(model)
    prompt = Prompt(tokens, documents, fresh)
    hidden_dtype, kv_dtype = _dtypes(spec, hidden_dtype, kv_dtype)
    try:
        choice = choose_layout(
            spec,
            machine,
            _objective(objective),
            hidden_dtype=hidden_dtype,
            kv_dtype=kv_dtype,
            prompt=prompt,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--objective") from error
    found = methods(
        spec, machine, prompt, hidden_dtype=hidden_dtype, kv_dtype=kv_dtype, layout=choice.layout
    )
    break_even = questions_to_break_even(spec, found, prompt)
    chosen = found[-1]
    if as_json:
        print_json(
            {
                "model": asdict(spec),
                "hardware": machine.name,
                "source": machine.source,
                "layout": str(choice.layout),
                "reason": choice.reason,
                "plan": chosen.plan.reason,
                "questions_to_break_even": break_even if math.isfinite(break_even) else None,
                "methods": [_as_row(method) for method in found],
            }
        )
        _write_pictures(found, draw, trace, f"{spec.name} on {machine.name}")
        return
    out.print(
        f"{tokens:,} tokens in {documents} document(s), {fresh} fresh, [bold]{spec.name}[/] on "
        f"[bold]{machine.name}[/]",
        highlight=False,
    )
    say(out, "", "", f"{machine.source}{f' ({path})' if path is not None else ''}")
    table = Table("", "time", "lower bound", "reading", "computing", "bytes a token", box=None)
    for method in found:
        row = _as_row(method)
        table.add_row(
            Text(method.name, "bold" if method is chosen else ""),
            *(_duration(row[k]) for k in ("time_s", "lower_bound_s", "reading_s", "computing_s")),
            size(method.bytes_per_token),
        )
    out.print(table)
    say(out, "kept: ", "bold", f"{choice.layout}; {choice.reason}")
    say(out, "restored: ", "bold", chosen.plan.reason)
    if math.isfinite(break_even):
        pays = f"after {break_even:.1f} question(s) about a document, each of which saves the rest"
    else:
        pays = "never: recomputing takes no longer"
    say(out, "pays off ", "bold", pays)
    if tokens + fresh > spec.window_tokens:
        beyond = f" {tokens + fresh:,} tokens do not fit into its window of {spec.window_tokens:,}"
        say(err, "note:", "yellow", beyond)
    _write_pictures(found, draw, trace, f"{spec.name} on {machine.name}")


@reported
def simulate(as_json: JsonOption = False) -> None:
    """Compare the simulator with the figures of the HCache paper, side by side."""
    from hcache_rag import paper

    schedules, ratios = paper.schedules(), paper.ratios()
    if as_json:
        rows = [{**asdict(r), "differences": r.differences, "is_near": r.is_near} for r in ratios]
        print_json({"schedules": [asdict(s) for s in schedules], "ratios": rows})
        return
    table = Table("layers", "paper", "found", "calibration", box=None)
    for check in schedules:
        pair = (" + ".join(map(str, numbers)) for numbers in (check.paper, check.found))
        table.add_row(check.what, *pair, check.calibration)
    out.print(table)
    table = Table("ratio", "paper", "simulated", "difference", box=None)
    for ratio in ratios:
        table.add_row(
            ratio.what,
            _range(ratio.paper, "{:.2f}"),
            _range(ratio.found, "{:.2f}"),
            Text(_range(ratio.differences, "{:+.0%}"), "" if ratio.is_near else "yellow"),
        )
    out.print(table)
    for ratio in ratios:
        if not ratio.is_near:
            say(out, f"{ratio.what}: ", "yellow", ratio.why)


def _range(ends: tuple[float, float], form: str) -> str:
    low, high = (form.format(end) for end in ends)
    return low if low == high else f"{low} to {high}"


def _show_list() -> None:
    from hcache_rag.presets import HARDWARE, MODELS

    table = Table("model", "layers", "hidden size", "heads", "KV heads", "dtype", box=None)
    for spec in MODELS.values():
        sizes = (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads)
        table.add_row(spec.name, *map(str, sizes), spec.dtype)
    out.print(table)
    table = Table("hardware", "reads", "source", box=None)
    for machine in HARDWARE.values():
        table.add_row(machine.name, f"{size(machine.cold.bytes_per_s)}/s", machine.source)
    out.print(table)


def _check_model(model: str | None) -> None:
    from hcache_rag.presets import MODELS

    if model is not None and model not in MODELS and not Path(model).is_dir():
        raise typer.BadParameter(
            f"{model!r} is neither a folder nor one of {', '.join(MODELS)}", param_hint="--model"
        )


def _spec(model: str | None) -> ModelSpec:
    from hcache_rag.presets import MODELS

    if model in MODELS:
        return MODELS[model]
    with quiet_transformers():
        from hcache_rag.bundled import MODEL_NAME, default_model_path
        from hcache_rag.models import load_config, spec_of

        config = load_config(model or str(default_model_path()))
    dtype = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return spec_of(config, model or MODEL_NAME, dtype)


def _hardware(name: str, store: Path) -> tuple[HardwareProfile, Path | None]:
    """A machine, and the file that it was found in."""
    from hcache_rag.presets import HARDWARE, hardware
    from hcache_rag.profile import HardwareProfile

    if name == "this":
        from hcache_rag.llama_index.folder import profile_paths

        for path in profile_paths(store):
            if path.is_file():
                return HardwareProfile.load(path), path
        raise ProfileError(
            "this machine has not been measured; run `hcache-rag profile`, or name --hardware"
        )
    if name not in HARDWARE and Path(name).is_file():
        return HardwareProfile.load(name), Path(name)
    return hardware(name), None


def _dtypes(spec: ModelSpec, hidden_dtype: str | None, kv_dtype: str | None) -> tuple[str, str]:
    from hcache_rag.choice import storage_dtypes

    default_hidden, default_kv = storage_dtypes(spec)
    found = (hidden_dtype or default_hidden, kv_dtype or default_kv)
    options = ("--hidden-dtype", "--kv-dtype")
    for option, dtype, kind in zip(options, found, (HIDDEN, KV), strict=True):
        one_of(option, dtype, STORAGE_DTYPES[kind])
    return found


def _objective(text: str) -> Objective:
    from hcache_rag.choice import Objective

    if text in ("time", "bytes"):
        return Objective(text)
    try:
        limit = float(text)
        if not math.isfinite(limit):
            raise ValueError(text)
        return Objective("time", limit)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither time, bytes nor a positive number", param_hint="--objective"
        ) from None


def _as_row(method: Method) -> dict[str, Any]:
    from hcache_rag.timeline import COMPUTING, READING

    return {
        "method": method.name,
        "layout": str(method.layout) if method.layout is not None else None,
        "time_s": method.time_s,
        "lower_bound_s": method.lower_bound_s,
        "reading_s": method.timeline.busy_s(READING),
        "computing_s": method.timeline.busy_s(COMPUTING),
        "bytes_per_token": method.bytes_per_token,
    }


def _write_pictures(found: list[Method], draw: Path | None, trace: Path | None, title: str) -> None:
    if draw is not None:
        target = picture(draw)
        with writing(target):
            from hcache_rag.timeline import draw as draw_timelines

            draw_timelines([(method.name, method.timeline) for method in found], target)
        say(err, "drawn: ", "", str(target))
    if trace is not None:
        with writing(trace):
            trace.write_text(found[-1].timeline.to_trace(title))
        say(err, "written: ", "", f"{trace}; open it at ui.perfetto.dev")


def _advice(bfloat16_speedup: float) -> str:
    from hcache_rag.models import PAYS_FROM

    measured = f"this CPU multiplies matrices {bfloat16_speedup:.1f}x as fast as in float32"
    if bfloat16_speedup >= PAYS_FROM:
        return f"{measured}; index with --dtype bfloat16 if answers may differ a little"
    return f"{measured}, so that float32 is the better choice"


def _mix_in_words(choice: Any) -> str:
    return f"{choice.layout}; {choice.reason}"


def _duration(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 10 else f"{seconds * 1e3:,.1f} ms"
