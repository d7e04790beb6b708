"""An exported page in headless Chromium: how fast it writes, and its picture for the README.

    python generate.py --export model.html
    python bench/page.py model.html            its first token and its tokens per second; of a
                                               large model --tokens 60
    python bench/page.py model.html --picture  docs/pictures/export.png

Needs playwright, which is in requirements-dev.txt, and Chromium.
"""

import argparse
import io
import shutil
import statistics
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.measure import record

ROOT = Path(__file__).parent.parent
TOKEN = 10  # whose alternatives are in the picture
PICTURE = ROOT / "docs" / "pictures" / "export.png"


@contextmanager
def opened(path: Path, **options):
    """The page of a file, once it has written its first text."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"),
                                             args=["--no-sandbox"])
        page = browser.new_page(**options)
        page.goto(path.resolve().as_uri())
        wait(page)
        yield page
        browser.close()


def wait(page) -> None:
    page.wait_for_function(
        "() => /^\\d+ tokens/.test(document.getElementById('status').textContent)", timeout=600_000)


def measure(path: Path, tokens: int, rounds: int = 5) -> dict[tuple[str, str], float]:
    """Seconds from opening the page of a file to its first token, and the median of the tokens per
    second in texts of so many."""
    with opened(path) as page:
        first = page.evaluate("performance.getEntriesByName('first token')[0].startTime") / 1000
        page.eval_on_selector("#max_new_tokens", "(input, n) => { input.min = input.step = 1; "
                              "input.value = n; }", tokens)
        rates = []
        for _ in range(rounds):
            page.click("#write")
            page.wait_for_selector("#continue:enabled", timeout=600_000)
            spent = page.evaluate("performance.getEntriesByName('writing').at(-1).duration") / 1000
            rates.append(tokens / spent)
    return {("first token", "s"): first,
            (f"a text of {tokens} tokens", "tokens/s"): statistics.median(rates)}


def draw(path: Path) -> None:
    """The alternatives of a token in a light window, and the attention of one in a dark window."""
    from PIL import Image  # comes with matplotlib

    shots = []
    for scheme in ("light", "dark"):
        with opened(path, color_scheme=scheme, viewport={"width": 700, "height": 1000}) as page:
            page.eval_on_selector("#status", "line => line.replaceChildren()")  # a machine's speed
            if scheme == "light":
                page.locator(".token").nth(TOKEN).click()
            else:
                page.check("input[value=attention]", force=True)
                page.locator(".token").nth(2 * TOKEN).hover()
                page.wait_for_timeout(2000)
            shots.append(page.screenshot())
    images = [Image.open(io.BytesIO(shot)) for shot in shots]
    both = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        both.paste(image, (number * images[0].width, 0))
    PICTURE.parent.mkdir(exist_ok=True)
    both.quantize(256).save(PICTURE, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--picture", action="store_true")
    parser.add_argument("--tokens", type=int, default=1000, help="in a text that is timed")
    flags = parser.parse_args()
    if flags.picture:
        draw(flags.page)
        print(f"{PICTURE}, {PICTURE.stat().st_size // 1024} KB")
    else:
        size = flags.page.stat().st_size / 1e6
        for (case, unit), value in {("size", "MB"): size,
                                    **measure(flags.page, flags.tokens)}.items():
            record("page.py", f"HTML file, {case}", value, "", None, unit)


if __name__ == "__main__":
    main()
