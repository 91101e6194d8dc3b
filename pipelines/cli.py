"""The command `voco`: one job file or one output per verb.

Exit codes: 0 done, 1 failed, 2 refused, 130 stopped; the last three print the reason in one line on stderr.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from voco.errors import exit_code

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

Parser = argparse.ArgumentParser
Options = argparse.Namespace


@dataclass(frozen=True)
class Verb:
    """A verb of the command line. `run` imports what it needs, so that `voco --help` is quick."""

    operand: str
    text: str
    run: Callable[[Options], int]
    add_options: Callable[[Parser], None] = lambda _parser: None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="voco", description="VoCo on Ray: one YAML file is one job")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        subparser = verbs.add_parser(name, help=verb.text, description=verb.text)
        subparser.add_argument("operand", metavar=verb.operand)
        verb.add_options(subparser)
    options = parser.parse_args(arguments)
    return exit_code(lambda: VERBS[options.verb].run(options))


def plan(options: Options) -> int:
    from voco.commands import costs, plan, rates
    from voco.commands.cluster import environment_address
    from voco.job.load import load_job

    job, assumed = load_job(options.operand), rates.read_rates(options.prices)
    _print("\n".join([*plan.plan_lines(options.operand, job), *costs.cost_lines(job, assumed)]))
    if environment_address() is not None:
        from voco.commands.capacity import plan_capacity

        _print("\n".join(plan_capacity(options.operand, job)))
    return plan.plan_exit_code(options.operand, job)


def submit(options: Options) -> int:
    from voco.commands.cluster import find_cluster
    from voco.commands.submit import submit
    from voco.job.load import load_job

    return submit(options.operand, load_job(options.operand), find_cluster(options.address), options.replace)


def run(options: Options) -> int:
    """The driver, inside the cluster: check that the workers have room, claim the run, then do the job."""
    from voco.commands.capacity import driver_notes
    from voco.commands.worker_groups import most_cpus
    from voco.job.load import load_job
    from voco.run import claim, logs, manifest, ray_init, wandb_tracking

    claim.listen_for_stop()  # also for a signal that comes while Ray starts
    logs.quiet_ray()
    job = load_job(options.operand)
    run_id = manifest.job_run_id(job)
    import pipelines

    tracked = job.tracking.wandb and os.environ.get("WANDB_MODE") != "disabled"
    modules = [pipelines.stage_module(job.kind), "pandas", *(["wandb"] if tracked else [])]  # pyarrow imports pandas
    ray_init.start_ray(most_cpus(job), modules)
    for note in driver_notes(options.operand, job):
        logs.get_logger("voco.run").warning("%s", note)
    claim.claim_run(run_id)
    contains_jobs = job.kind in ("flow", "sweep")
    with wandb_tracking.wandb_group(run_id if contains_jobs else None):
        pipelines.run(job, options.replace)
    return 0


def status(options: Options) -> int:
    from voco.commands.follow import print_status

    return print_status(_cluster(options), options.operand)


def logs(options: Options) -> int:
    from voco.commands.follow import follow_logs

    return follow_logs(_cluster(options), options.operand)


def stop(options: Options) -> int:
    from voco.commands.follow import stop_run

    return stop_run(_cluster(options), options.operand)


def show(options: Options) -> int:
    from voco.commands.show import show_output
    from voco.store import storage

    _print(show_output(storage.resolve(options.operand)))
    return 0


def render(options: Options) -> int:
    from voco.commands import render

    _print(render.render_rayjob(options.operand, options.image or render.IMAGE), end="")
    return 0


def ask(options: Options) -> int:
    from voco.commands.ask import run_ask

    return run_ask(options)


def judge(options: Options) -> int:
    from voco.commands.judge import run_judge

    return run_judge(options)


def score(options: Options) -> int:
    from voco.commands.score import run_score

    return run_score(options)


def report(options: Options) -> int:
    from voco.report import html
    from voco.store import storage

    output = storage.resolve(options.operand)
    print(html.write_report(outputs=[output], to=storage.join(output, "report.html"), title=output.rsplit("/", 1)[-1]))
    return 0


def _cluster(options: Options) -> JobSubmissionClient:
    from voco.commands.cluster import connect, find_cluster

    return connect(find_cluster(options.address))


def _print(text: str, end: str = "\n") -> None:
    """Print, also into a pipe that is closed early, as by `voco plan JOB | head -1`."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python still flushes when it exits


def _add_address(parser: Parser) -> None:
    parser.add_argument(
        "--address", help="the cluster's Jobs API, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or the demo's)"
    )


def _add_plan(parser: Parser) -> None:
    parser.add_argument(
        "--prices", metavar="FILE", help="YAML: prices of nodes, and rates to assume instead of the defaults (docs/operations.md)"
    )


def _add_replace(parser: Parser) -> None:
    parser.add_argument("--replace", action="store_true", help="overwrite an output that another run wrote")


def _add_submit(parser: Parser) -> None:
    _add_replace(parser)
    _add_address(parser)


def _add_render(parser: Parser) -> None:
    parser.add_argument(
        "--kuberay", action="store_true", required=True, help="a RayJob with its ConfigMap (the only format so far)"
    )
    parser.add_argument("--image", help="container image with this package installed")


def _tokens(text: str) -> int | str:
    """The value of --tokens: `auto`, or a number, for which argparse reports the ValueError."""
    return text if text == "auto" else int(text)


def _add_ask(parser: Parser) -> None:
    parser.add_argument("media", metavar="MEDIA", nargs="*", help="images and videos, on disk or s3://")
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument("--cache", metavar="URI", default="~/.cache/voco", help="where caches are kept (default: %(default)s)")
    parser.add_argument("--no-cache", action="store_true", help="read and keep no cache: compress again")
    parser.add_argument(
        "--tokens", type=_tokens, metavar="N", help="how many <voco> tokens of each view to read (default: the checkpoint's N), "
        "or auto: 1, 2, 4 ... until the model is sure"
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="with --tokens auto: the least margin of the first token, 0 to 1, as an "
        "evaluation with `tokens: auto` prints it for a budget (default: %(default)s)"
    )  # fmt: skip
    parser.add_argument(
        "--frames", type=int, default=8, help="frames to read of each video, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, always takes the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    parser.add_argument("--keep-system", action="store_true", help="also cache the template's own text; with one medium only")


def _add_judge(parser: Parser) -> None:
    parser.add_argument("--endpoint", metavar="URL", required=True, help="of an OpenAI-compatible server: https://HOST/v1")
    parser.add_argument("--model", metavar="NAME", required=True, help="the judge; OPENAI_API_KEY has the key, if it needs one")
    parser.add_argument("--to", metavar="DIR", help="where verdicts and summary.json go (default: judge/NAME beside the answers)")
    parser.add_argument("--parallel", type=int, default=8, help="requests at a time (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one request in all (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=5, help="requests for one answer, at most (default: %(default)s)")
    parser.add_argument(
        "--max-failures", type=int, default=10, help="answers without a reply before the run ends (default: %(default)s)"
    )
    parser.add_argument(
        "--request", metavar="JSON", default="{}", help="fields of each request (default: temperature 0, max_tokens 256)"
    )


def _add_score(parser: Parser) -> None:
    parser.add_argument("file", metavar="FILE.jsonl", help="a line for each answer, with `prediction` and `references`")
    parser.add_argument("--output", metavar="FILE", help="where each line's mark goes (default: FILE.marks.jsonl)")


VERBS = {
    "plan": Verb("JOB", "check a job file; print its stages, inputs, sizes, resources and costs; run nothing", plan, _add_plan),
    "submit": Verb("JOB", "submit a job file to a Ray cluster and follow its log", submit, _add_submit),
    "run": Verb("JOB", "run a job file here: on the cluster of RAY_ADDRESS, else on a local Ray", run, _add_replace),
    "status": Verb("RUN", "print the state of a run; RUN is a run id, a submission id or a job file", status, _add_address),
    "logs": Verb("RUN", "follow the log of a run; Ctrl-C stops following, not the run", logs, _add_address),
    "stop": Verb("RUN", "stop a run cleanly; submitted again, it continues", stop, _add_address),
    "show": Verb("OUTPUT", "print what an output holds: its counts, and some rows of its tables", show),
    "render": Verb("JOB", "print a job file as a KubeRay RayJob, for kubectl", render, _add_render),
    "ask": Verb("CHECKPOINT", "ask a checkpoint a question about images and videos", ask, _add_ask),
    "judge": Verb("ANSWERS", "let a language model judge the answers of an output or of a .jsonl file", judge, _add_judge),
    "score": Verb("METRIC", "mark predictions by a benchmark's rule, and print the set's official figures", score, _add_score),
    "report": Verb("OUTPUT", "write OUTPUT/report.html: the tables and plots of any output", report),
}
