"""The exported page in headless Chromium, opened from a file."""

import json

import numpy as np
import pytest
from browser import chromium
from conftest import VERSES
from test_server import Served
from tinygrad import Tensor

import generate
from gpt import GPT, GPTConfig, SampleConfig
from tinygpt.data.tokenizer import BPETokenizer
from tinygpt.export import html

BLOCK = 32  # of the model, whose texts grow longer than that
PROMPT = "JULIET:\nThen walk"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The checkpoint of a run of twenty steps that has been resumed from it. The distributions of
    its model are neither flat nor certain."""
    folder = tmp_path_factory.mktemp("run")
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=300, n_layer=2, n_head=2, n_embd=32))
    model.wte.weight.assign(model.wte.weight * 25).realize()
    model.tokenizer = BPETokenizer.train(VERSES, 300)
    records = [{"iter": i, "loss": 5 - i / 10} for i in range(1, 31)]
    records += [{"iter": i, "train_loss": 5.0, "val_loss": 5.25 - i / 10, "bits_per_byte": 2.5}
                for i in (0, 20, 30)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    data = {"source": "texts/verses.txt", "training_tokens": 12345, "validation_tokens": 67}
    return model.save_checkpoint(20, out_dir=folder, metadata={"data": data})


@pytest.fixture(scope="module")
def model(run):
    return GPT.from_checkpoint(run).quantize("int8")


@pytest.fixture(scope="module")
def file(run):
    path = run.parent / "model.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "TOKENS", 60)
        assert generate.main(["--checkpoint", str(run), "--export", str(path), PROMPT]) == 0
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, file):
    """The page after it has written its first text. It may not fetch, and has nothing to report."""
    page = browser.new_page(viewport={"width": 900, "height": 900})
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    written(page)
    yield page
    page.close()
    assert not complaints
    assert all(url == file.as_uri() or url.startswith("blob:") for url in requests)


def written(page, tokens: int = 60) -> list[int]:
    """The ids of the page's text, once the model has written so many tokens."""
    page.wait_for_function("n => document.getElementById('status').textContent.startsWith(n)",
                           arg=f"{tokens} tokens")
    return page.eval_on_selector_all(".token", "all => all.map(t => Number(t.dataset.id))")


def forget(page) -> None:
    """Clears the line that `written` waits for, before the model writes anew."""
    page.eval_on_selector("#status", "line => { line.textContent = ''; }")


def expected(model, ids: list[int], **options) -> list[int]:
    """ids and the 60 tokens that generate.py writes after them."""
    options = {"max_new_tokens": 60} | options
    return ids + list(model.stream([ids], config=SampleConfig(**options)))


def set_options(page, **options) -> None:
    page.eval_on_selector("#sampling", "list => { list.open = true; }")
    for name, value in options.items():
        page.locator(f"#{name}").fill(str(value))


@pytest.mark.parametrize("options", [
    {}, {"seed": 2**32 - 1, "window_hop": 10, "temperature": 1.5},
    {"temperature": 0, "repetition_penalty": 2}], ids=str)
def test_the_text_is_that_of_generate_py(page, model, options):
    set_options(page, **options)
    forget(page)
    page.click("#write")
    assert written(page) == expected(model, model.tokenizer.encode(PROMPT), **options)


def test_every_cut_at_its_end_leaves_the_likeliest_token(page, model):
    likeliest = expected(model, model.tokenizer.encode(PROMPT), temperature=0)
    off = {"temperature": 0.8, "top_k": 0, "top_p": 1, "min_p": 0}
    for cut in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.05}, {"min_p": 1}):
        set_options(page, **off | cut)
        forget(page)
        page.click("#write")
        assert written(page) == likeliest, cut


def test_the_text_and_what_is_known_of_the_model_are_shown(page, model):
    ids = written(page)
    shown = page.text_content("#text").replace(" end of text ", "")
    assert shown.rstrip("\ufffd") == model.tokenizer.decode(ids).rstrip("\ufffd")
    known = page.text_content("#summary") + page.text_content("#sizes")
    for fact in ("300 tokens", "int8", "verses.txt", "12,345 tokens", "20 steps", "3.25 nats",
                 "2.50 bits per byte", f"{model.config.num_params():,} parameters"):
        assert fact in known, fact
    batches = page.get_attribute("path.batches", "d")
    assert batches.count(",") == 20 and page.get_attribute("path.validation", "d").count(",") == 2


def test_a_damaged_log_leaves_out_the_curve(run, tmp_path):
    copy = tmp_path / run.name
    copy.write_bytes(run.read_bytes())
    assert html.training(copy)["loss"] == []
    (tmp_path / "metrics.jsonl").write_text('{"iter": 3, "lo')
    assert html.training(copy)["evaluations"] == [] and html.training(copy)["step"] == 20


def test_the_alternatives_of_a_token_are_the_likeliest(page, model):
    ids = written(page)
    page.locator(".token").nth(20).hover()
    rows = page.locator("#popover li button")
    logits = model(Tensor([ids[:20]])).numpy()[0, -1]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    listed = [int(row.get_attribute("data-id")) for row in rows.all()]
    assert listed[:10] == np.argsort(-p)[:10].tolist()
    assert ids[20] in listed
    for row, i in zip(rows.all(), listed, strict=True):
        percent = row.locator(".p").text_content().removeprefix("<").removesuffix("%")
        assert float(percent) / 100 == pytest.approx(p[i], rel=0.06, abs=1e-4), i
    shade = float(page.locator(".token").nth(20).evaluate(
        "token => token.style.getPropertyValue('--surprise')"))
    assert shade == pytest.approx(-np.log2(p[ids[20]]) / np.log2(300), abs=0.002)


def test_the_text_goes_on_from_an_alternative_and_can_be_undone(page, model):
    before = written(page)
    page.locator(".token").nth(25).click()
    row = page.locator("#popover li button:not(.drawn)").nth(2)
    other = int(row.get_attribute("data-id"))
    row.click()
    page.wait_for_function(f"() => document.querySelectorAll('.token').length === {25 + 1 + 60}")
    assert written(page) == expected(model, [*before[:25], other])
    page.click("#back")
    assert page.locator(".token").count() == len(before)


def test_a_text_is_continued_as_if_it_had_not_stopped(page, model):
    ids = model.tokenizer.encode(PROMPT)
    page.click("#continue")
    page.wait_for_function(f"() => document.querySelectorAll('.token').length === {len(ids) + 120}")
    assert written(page) == expected(model, ids, max_new_tokens=120)


def test_stop_ends_a_text(page):
    set_options(page, max_new_tokens=1000)
    page.evaluate("""async () => {
        document.getElementById("write").click();
        while (document.getElementById("stop").hidden) await new Promise(setTimeout);
        document.getElementById("stop").click();
    }""")
    page.wait_for_selector("#continue:enabled")
    assert page.locator(".token").count() < 1000


def attention(page) -> np.ndarray:
    """The weights by which the tokens are shaded."""
    shades = page.eval_on_selector_all(
        ".token", "all => all.map(t => Number(t.style.getPropertyValue('--attention')))")
    return np.array(shades) ** 2


def test_attention_is_a_distribution_over_the_tokens_before(page):
    page.check("input[value=attention]", force=True)
    for at in (20, 50):  # the second one is beyond the first window
        page.locator(".token").nth(at).hover()
        page.wait_for_function("""at => document.querySelectorAll(".token")[at]
            .style.getPropertyValue("--attention") > 0""", arg=at)
        weights = attention(page)
        assert weights.sum() == pytest.approx(1, abs=0.02)
        assert not weights[at + 1:].any() and not weights[:max(0, at + 1 - BLOCK)].any()
    mean = weights
    heads = []
    for head in range(1, 5):
        page.check(f"input[name=head][value='{head}']", force=True)
        heads.append(attention(page))
    np.testing.assert_allclose(np.mean(heads, axis=0), mean, atol=0.01)


def test_a_token_of_the_prompt_has_alternatives_too(page):
    page.locator(".token").nth(3).click()
    page.wait_for_selector("#popover li")
    assert page.locator("#popover li").count() >= 10
    page.locator(".token").nth(0).click()
    page.wait_for_function("() => !document.querySelector('#popover li')")


def test_it_works_by_keyboard(page, model):
    page.focus("#prompt")
    forget(page)
    page.keyboard.press("Control+Enter")
    before = written(page)
    page.locator(".token").first.focus()
    for _ in range(20):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.wait_for_function(  # not for its buttons alone, which come before the focus does
        "() => document.getElementById('popover').contains(document.activeElement)")
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => document.activeElement.dataset.id !== undefined")
    other = int(page.evaluate("document.activeElement.dataset.id"))
    page.keyboard.press("Enter")
    page.wait_for_function(f"() => document.querySelectorAll('.token').length === {20 + 1 + 60}")
    assert written(page) == expected(model, [*before[:20], other])
    page.keyboard.press("Escape")
    assert page.locator("#popover").is_hidden()


def test_nothing_can_be_fetched(browser, file):
    page = browser.new_page()
    page.goto(file.as_uri())
    for url in ("data:text/plain,x", file.as_uri()):
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate("url => fetch(url)", url)
    page.close()


def test_it_fits_a_narrow_window_in_dark_and_light(browser, file):
    inks = set()
    for scheme in ("dark", "light"):
        page = browser.new_page(viewport={"width": 360, "height": 640}, color_scheme=scheme)
        page.goto(file.as_uri())
        written(page)
        page.locator(".token").nth(20).click()
        page.check("input[value=attention]", force=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        inks.add(page.evaluate("getComputedStyle(document.body).color"))
        page.close()
    assert len(inks) == 2


# ---- the page of a server

ADDRESS = "http://model.test/"  # nothing is sent: the browser's requests are answered here


def answer(ids: list[int], vocab_size: int = 300) -> str:
    """A stream of /v1/completions in which every token has probability 1/2, and the next id 1/4."""
    events = [{"choices": [{"text": "", "logprobs": {
        "tokens": [f"token_id:{i}"], "token_logprobs": [np.log(0.5)],
        "top_logprobs": [{f"token_id:{(i + 1) % vocab_size}": np.log(0.25),
                          f"token_id:{i}": np.log(0.5)}]}}]} for i in ids]
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


@pytest.fixture
def served(browser, model):
    """A page without a module, the bodies of its requests, and what they are answered."""
    metadata = html.describe(model, "big/model.safetensors", PROMPT, SampleConfig(top_p=0.9))
    page, bodies, answers = browser.new_page(), [], []

    def reply(route):
        bodies.append(json.loads(route.request.post_data))
        route.fulfill(**answers.pop(0))
    page.route(ADDRESS, lambda route: route.fulfill(body=html.page(metadata),
                                                    content_type="text/html"))
    page.route(f"{ADDRESS}v1/completions", reply)
    page.goto(ADDRESS)
    yield page, bodies, answers
    page.close()


def test_the_page_of_a_server_shows_what_the_server_writes(served, model):
    page, bodies, answers = served
    prompt = model.tokenizer.encode(PROMPT)
    answers += [{"body": answer([10, 11, 12])}, {"body": answer([20, 21])}]
    assert page.locator("input[value=attention]").count() == 0
    set_options(page, temperature=0.5, seed=7, max_new_tokens=30)
    page.click("#write")
    assert written(page, 3) == [*prompt, 10, 11, 12]
    body = bodies[0]
    assert body["prompt"] == prompt and body["max_tokens"] == 30 and body["model"] == "model"
    assert body["window_hop"] == BLOCK // 2
    assert body["stream"] and body["logprobs"] == 10 and body["return_tokens_as_token_ids"]
    assert (body["temperature"], body["top_p"], body["top_k"], body["seed"]) == (0.5, 0.9, None, 7)
    page.locator(".token").nth(len(prompt) + 1).click()
    rows = page.locator("#popover li button").all()
    assert [row.get_attribute("data-id") for row in rows] == ["11", "12"]
    assert rows[0].text_content().endswith("50%") and rows[1].text_content().endswith("25%")
    rows[1].click()
    assert written(page, 2) == [*prompt, 10, 12, 20, 21]
    assert bodies[1]["prompt"] == [*prompt, 10, 12]


def test_the_page_of_a_server_shows_its_errors(served):
    page, _, answers = served
    answers.append({"status": 429, "body": json.dumps({"error": {"message": "too many texts"}})})
    page.click("#write")
    page.wait_for_selector("#status.error")
    assert "too many texts" in page.text_content("#status")
    assert page.locator("#write").is_enabled()


@pytest.fixture(scope="module")
def server(run, browser):  # without a browser none is started
    server = Served(run)
    yield server
    server.close()


def test_the_page_of_a_real_server(browser, server, run):
    model, page, complaints = GPT.from_checkpoint(run), browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.port}/")
    set_options(page, max_new_tokens=40, seed=3)
    page.fill("#prompt", PROMPT)
    page.click("#write")
    options = {"temperature": 0.9, "max_new_tokens": 40, "seed": 3}
    ids = expected(model, model.tokenizer.encode(PROMPT), **options)
    assert written(page, 40) == ids
    page.locator(".token").nth(25).click()
    rows = page.locator("#popover li button")
    logits = model(Tensor([ids[:25]])).numpy()[0, -1]
    listed = [int(row.get_attribute("data-id")) for row in rows.all()]
    assert listed[:10] == np.argsort(-logits)[:10].tolist()
    forget(page)
    rows.nth(2).click()
    assert written(page, 40) == expected(model, [*ids[:25], listed[2]], **options)
    page.close()
    assert not complaints
