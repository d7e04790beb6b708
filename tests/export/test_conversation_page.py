"""The conversation on the page of a server and on an exported page, in headless Chromium."""

import itertools
import json
from types import SimpleNamespace

import pytest
from browser import chromium
from conftest import VERSES

import generate
from gpt import GPT, GPTConfig, SampleConfig
from tinygpt.data.chat import chat_template_of
from tinygpt.data.tokenizer import BPETokenizer, ByteTokenizer
from tinygpt.export import html

ADDRESS = "http://model.test/"  # nothing is sent: the browser's requests are answered here
TOO_LONG = {"status": 400, "body": json.dumps(
    {"error": {"message": "too long", "code": "context_length_exceeded"}})}


def answer(*pieces: str, finish: str = "stop") -> dict:
    """A stream of /v1/chat/completions."""
    choices = [{"delta": {"content": piece}, "finish_reason": None} for piece in pieces]
    choices.append({"delta": {}, "finish_reason": finish})
    events = [json.dumps({"choices": [choice]}) for choice in choices] + ["[DONE]"]
    return {"body": "".join(f"data: {event}\n\n" for event in events)}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def metadata():
    model = GPT(GPTConfig(block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=16))
    model.tokenizer = ByteTokenizer()
    return html.describe(model, "big/model.safetensors", "Once", SampleConfig(top_p=0.9))


@pytest.fixture
def open_page(browser):
    """Opens the page of a model, with what its requests are answered: the page, and their bodies.
    None is answered only by an abort."""
    opened, complaints = [], []

    def run(metadata: dict, *answers: dict | None, view: str = "#conversation", **options):
        page, bodies, left = browser.new_page(**options), [], list(answers)
        opened.append(page)

        def reply(route):
            bodies.append(json.loads(route.request.post_data))
            if (made := left.pop(0)) is not None:
                route.fulfill(**made)

        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.route(ADDRESS, lambda route: route.fulfill(body=html.page(metadata),
                                                        content_type="text/html"))
        page.route(f"{ADDRESS}v1/chat/completions", reply)
        page.goto(ADDRESS + view)
        return page, bodies

    yield run
    for page in opened:
        page.close()
    assert not complaints


def send(page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def wait(page) -> list[str]:
    """The messages, once the answer is there."""
    page.wait_for_selector("#hush", state="hidden")
    return page.locator(".message").all_text_contents()


def test_messages_are_sent_and_answers_shown(open_page, metadata):
    page, bodies = open_page(metadata, answer("Hel", "lo!"), answer("Bye", finish="length"))
    page.locator("summary", has_text="System message").click()
    page.fill("#system", "Be kind.")
    page.fill("#message", "Hi")
    page.press("#message", "Shift+Enter")
    page.keyboard.type("there")
    page.press("#message", "Enter")
    assert wait(page) == ["Hi\nthere", "Hello!"]
    send(page, "  ")  # nothing
    send(page, "So long")
    assert wait(page) == ["Hi\nthere", "Hello!", "So long", "ByeCut off at the maximum length."]
    system, first = {"role": "system", "content": "Be kind."}, {"role": "user",
                                                              "content": "Hi\nthere"}
    assert bodies[0] | {"temperature": 0.8, "top_p": 0.9, "max_tokens": 32, "stream": True,
                        "model": "model", "messages": [system, first]} == bodies[0]
    assert "seed" not in bodies[0] and "window_hop" not in bodies[0]
    assert bodies[1]["messages"] == [system, first, {"role": "assistant", "content": "Hello!"},
                                     {"role": "user", "content": "So long"}]
    page.click("#reset")
    assert wait(page) == [] and page.locator("#reset").is_hidden()


def test_the_oldest_turns_are_forgotten_where_the_server_finds_no_room(open_page, metadata):
    page, bodies = open_page(metadata, answer("a"), answer("b"), *[TOO_LONG] * 3, answer("c"),
                             *[TOO_LONG] * 6)
    for text in ("one", "two", "three"):
        send(page, text)
        wait(page)
    assert [([m["content"] for m in body["messages"]], body["max_tokens"])
            for body in bodies[2:]] == [
        (texts, tokens) for texts in (["one", "a", "two", "b", "three"], ["two", "b", "three"])
        for tokens in (32, 16)]
    assert page.locator(".message.forgotten").all_text_contents() == ["one", "a"]
    assert page.eval_on_selector("#forgotten", "line => line.nextSibling.textContent") == "two"
    send(page, "too long in itself")
    assert wait(page)[-1] == "c" and "too long" in page.text_content("#talk-status.error")
    assert page.input_value("#message") == "too long in itself"


def test_escape_stops_an_answer_and_an_error_gives_the_message_back(open_page, metadata):
    broken = {"status": 500, "body": json.dumps({"error": {"message": "the model failed"}})}
    page, bodies = open_page(metadata, None, broken, answer("yes"))
    send(page, "one")
    page.locator("#hush").wait_for()
    page.keyboard.press("Escape")
    assert wait(page) == ["one", "Stopped."]
    send(page, "two")
    page.wait_for_selector("#talk-status.error")
    assert "the model failed" in page.text_content("#talk-status")
    assert wait(page) == ["one", "Stopped."] and page.input_value("#message") == "two"
    page.press("#message", "Enter")
    assert wait(page)[2:] == ["two", "yes"]
    assert [m["content"] for m in bodies[-1]["messages"]] == ["one", "", "two"]


def test_the_switch_shows_one_of_the_two_with_the_settings(open_page, metadata):
    page, _ = open_page(metadata, view="")
    assert page.locator("#prompt").is_visible() and page.locator("#message").is_hidden()
    page.focus("input[value=text]")
    page.keyboard.press("ArrowRight")
    assert page.locator("#prompt").is_hidden() and page.locator("#message").is_visible()
    assert page.url.endswith("#conversation")
    page.locator("summary", has_text="Sampling").click()
    assert page.locator("#temperature").is_visible() and page.locator("#seed").is_hidden()
    page.click("input[value=text] + span")
    assert page.locator("#seed").is_visible() and page.locator("#prompt").is_visible()


def test_what_has_a_template_or_a_tokenizer_of_its_own_begins_with_the_conversation(
        open_page, metadata):
    page, _ = open_page(metadata | {"has_template": True}, view="")
    assert page.locator("#message").is_visible() and page.locator("#modes").is_visible()
    page, _ = open_page(metadata | {"tokenizer": {"kind": "hf"}}, view="")
    assert page.locator("#message").is_visible() and page.locator("#modes").is_hidden()


def test_it_fits_a_narrow_window_in_dark_and_light(open_page, metadata):
    inks = set()
    for scheme in ("dark", "light"):
        page, _ = open_page(metadata, answer("w" * 200), color_scheme=scheme,
                            viewport={"width": 360, "height": 640})
        send(page, "v" * 200)
        wait(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        inks.add(page.evaluate("getComputedStyle(document.querySelector('.message')).color"))
    assert len(inks) == 2


def test_an_exported_page_has_none_of_it_unless_asked_for(metadata):
    made = html.page(metadata, SimpleNamespace(layout={}, code=b"", weights=b""))
    assert b"conversation" not in made and b"chat/completions" not in made
    assert b"conversation" in html.page(metadata)


# ---- an exported page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint whose model ends some answers with end-of-text."""
    config = GPTConfig(block_size=128, vocab_size=300, n_layer=1, n_head=2, n_embd=16)
    model = GPT(config, seed=55)
    for weight in model.state_dict().values():
        if weight.ndim == 2:
            weight.assign(weight * 25).realize()
    model.tokenizer = BPETokenizer.train(VERSES, 300)
    return model.save_checkpoint(1, out_dir=tmp_path_factory.mktemp("chat"))


@pytest.fixture
def exported(browser, trained, tmp_path):
    page = browser.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    path = tmp_path / "chat.html"
    assert generate.main(["--checkpoint", str(trained), "--chat", "--system", "Be <kind>.",
                          "--export", str(path)]) == 0
    page.goto(path.as_uri())
    page.wait_for_function("() => document.getElementById('status').textContent === ''")
    page.locator("summary", has_text="Sampling").click()
    page.eval_on_selector("#temperature", "e => { e.value = 0; }")
    yield page
    page.close()
    assert not complaints
    assert all(url.startswith((path.as_uri(), "blob:")) for url in requests)


def test_an_exported_page_answers_as_the_model_does(exported, trained):
    model = GPT.from_checkpoint(trained).quantize("int8")
    template, stop = chat_template_of(model.tokenizer), model.tokenizer.end_of_text
    assert exported.input_value("#system") == "Be <kind>."
    messages, shown, endings = [{"role": "system", "content": "Be <kind>."}], [], set()
    for text in ("o Romeo", "wherefore?"):
        send(exported, text)
        shown.append(text)
        messages.append({"role": "user", "content": text})
        ids = template.encode(messages, reply=True)
        room = 64 if len(ids) + 64 <= 128 else 32
        made = list(itertools.takewhile(lambda i: i != stop, model.stream(
            ids, max_new_tokens=room, temperature=0.0)))
        answer = model.tokenizer.decode(made)
        messages.append({"role": "assistant", "content": answer})
        note = "Cut off at the maximum length." if len(made) == room else ""
        endings.add(note)
        shown.append(answer + note)
        assert wait(exported) == shown
    assert len(endings) == 2


def test_an_exported_page_forgets_turns_and_continues_texts_too(exported):
    for text in ("o Romeo", "wherefore?", "art"):
        send(exported, text)
        shown = wait(exported)
    assert len(shown) == 6 and exported.locator(".message.forgotten").count() in (2, 4)
    exported.click("input[value=text] + span")
    exported.fill("#prompt", "Romeo")
    exported.click("#write")
    exported.wait_for_function(
        "() => document.getElementById('status').textContent.includes('tokens')")
    assert exported.locator(".token").count() > 2


def test_a_template_of_its_own_cannot_be_exported():
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    with pytest.raises(ValueError, match="leave out --chat, or use --serve"):
        html.describe_chat(tokenizer, None)
