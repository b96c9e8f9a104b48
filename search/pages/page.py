"""The report as one HTML page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from search import secrecy
from search.errors import RequestError
from search.guard import verdicts
from search.loop.watcher import Watcher
from search.pages import page_record, sections
from search.pages.markup import coded
from search.pages.page_record import Read, lasting, span
from search.pages.stylesheet import STYLE
from search.pages.svg import safe
from search.study import Study
from search.tracker import publishing


def page(study: Study) -> str:
    """The report of a study as one HTML page."""
    read = page_record.read(study)
    parts = [
        ("numbers", "Three numbers", sections.three(read)),
        (
            "winner",
            f"{'The winner' if read.found['winner'] else 'The best so far'} beside the baseline",
            sections.winner(read),
        ),
        ("search", "How the search went", sections.search(read)),
        ("parameters", "What mattered", sections.parameters(read)),
        ("next", "What to search next", sections.suggested(read)),
        ("failures", "Failures", sections.failures(read)),
        ("time", "How slots were used", sections.slots(read)),
        ("trials", "All trials", sections.table(read)),
        ("made", "How it was made", sections.made(read)),
    ]
    shown = [(anchor, title, made) for anchor, title, made in parts if made]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    body = "".join(f'<section id="{anchor}"><h2>{title}</h2>\n{made}</section>\n' for anchor, title, made in shown)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # Nothing on the page can run or load anything, whatever a name may hold.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{safe(read.found['study'])}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{safe(read.found['study'])}</h1>\n{_about(read)}{_verdict(read)}\n"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n'
        f"<footer>{_footer(read)}</footer>\n</body>\n</html>\n"
    )


def write(study: Study, out: str | os.PathLike[str]) -> Path:
    """Write the page to a file, whole or not at all.

    Raises:
        RequestError: If the file cannot be written.
    """
    path = Path(out).expanduser()
    if path.is_dir():
        raise RequestError(f"--html must name a file that can be written, but {path} is a folder")
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")  # `heldout gc` knows one that was left behind
    try:
        with draft.open("w", encoding="utf-8") as file:  # before what takes seconds
            file.write(page(study))
        os.replace(draft, path)
    except OSError as error:
        raise RequestError(f"--html must name a file that can be written, but {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def keep(folder: Path, watcher: Watcher) -> None:
    """Put the page into the study's folder, where the tracker takes it from; a study does not fail by its report."""
    try:
        write(Study.at(folder), folder / publishing.PAGE)
    except Exception as error:
        watcher.say(f"the report's page could not be written: {secrecy.scrub(str(error))}")


# ---- the head


def _about(read: Read) -> str:
    found, counts = read.found, read.found["trials"]
    better = "lower" if found["direction"] == "min" else "higher"
    space = (read.study.get("space") or {}).get("name", "")
    done = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete")
    state = "" if found["state"] == "COMPLETE" else f" The study is {str(found['state']).lower()}."
    because = f" It {found['because']}." if found["because"] else ""
    line = (
        f"Search of <b>{safe(space)}</b> for {safe(read.metric)} ({better} is better): {done} trials in "
        f"{lasting(found['seconds'])}.{state}{safe(because)}"
    )
    return f'<p class="soft">{line}</p>\n'


def _verdict(read: Read) -> str:
    found = read.found
    names = "".join(
        f"<li><b>{safe(name)}</b> {safe(verdicts.MEANING.get(name, ''))}</li>" for name in found["verdicts"]
    )
    shown = f"<ul>{names}</ul>" if names else ""
    return (
        '<section class="verdict" aria-label="Verdict"><h2>What to believe</h2>\n'
        f'<p class="head">{safe(_headline(read))}</p>\n{shown}\n<p>{coded(found["believe"])}</p></section>'
    )


def _headline(read: Read) -> str:
    found, numbers = read.found, read.numbers
    test, corrected, role = found["test"], found["corrected"], read.chosen
    if role is None:
        return "No trial has completed, so there is no number to believe."
    if test is not None:
        said = f"Test {read.metric} {numbers(test['winner'])}"
        said += "" if test["interval"] is None else f", plausibly {span(test['interval'], numbers)}"
        if role.get("trial") == (found["baseline"] or {}).get("trial"):
            return f"{said}. The search found nothing better than the default configuration."
        gain = "" if test["beats_baseline"] is None else "a gain" if test["beats_baseline"] else "no gain"
        return f"{said}; {gain} over the default configuration is shown." if gain else f"{said}."
    if corrected is not None and corrected["interval"] is not None:
        estimate, between = numbers(corrected["estimate"]), span(corrected["interval"], numbers)
        return f"Not tested yet; by guard rows {read.metric} is {estimate}, plausibly {between}."
    score = numbers(role["validation"])
    return f"Not tested yet; the best validation score, {score}, flatters, because the search chose by it."


def _footer(read: Read) -> str:
    version = (read.study.get("versions") or {}).get("heldout")
    at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return f"Written by Heldout{f' {safe(version)}' if version else ''} on {at}."
