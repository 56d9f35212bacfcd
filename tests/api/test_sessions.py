"""``/v1/sessions``."""

from __future__ import annotations

import httpx2
import pytest

from tests.api.running import PlayedWorker
from tests.api.test_jobs import submit
from tests.waiting import until


def conversation(client: httpx2.Client, worker: PlayedWorker, *texts: str) -> str:
    """A session with one turn for each text; returns its id."""
    session_id = client.post("/v1/sessions").json()["id"]
    for text in texts:
        job = submit(client, prompt=text, session_id=session_id)
        worker.answer(job["id"], f"{text}!")
    return session_id


def texts_of(client: httpx2.Client, session_id: str) -> list[str]:
    page = client.get(f"/v1/sessions/{session_id}/messages", params={"limit": 100}).json()
    return [message["content"][-1]["text"] for message in page["data"]]


def test_a_session_is_opened_and_looked_at(client: httpx2.Client) -> None:
    response = client.post("/v1/sessions", json={"metadata": {"customer": "7"}})
    assert response.status_code == 201
    session = response.json()
    assert response.headers["location"] == f"/v1/sessions/{session['id']}"
    assert session["turns"] == 0
    assert client.get(f"/v1/sessions/{session['id']}").json() == session


def test_a_session_is_opened_without_a_body(client: httpx2.Client) -> None:
    assert client.post("/v1/sessions").json()["metadata"] == {}


def test_sessions_are_listed_newest_first(client: httpx2.Client) -> None:
    made = [client.post("/v1/sessions").json()["id"] for _ in range(3)]
    page = client.get("/v1/sessions", params={"limit": 2}).json()
    assert [session["id"] for session in page["data"]] == [made[2], made[1]]
    page = client.get("/v1/sessions", params={"cursor": page["next_cursor"]}).json()
    assert [session["id"] for session in page["data"]] == [made[0]]
    assert page["next_cursor"] is None


def test_turns_run_in_order_and_their_messages_are_kept(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    first = submit(client, prompt="one", session={"metadata": {"a": "b"}})
    second = submit(client, prompt="two", session_id=first["session_id"])
    assert (first["turn"], first["status"]) == (1, "queued")
    assert (second["turn"], second["status"]) == (2, "waiting")
    worker.answer(first["id"], "one!")
    assert client.get(f"/v1/jobs/{second['id']}").json()["status"] == "queued"
    worker.answer(second["id"], "two!")
    assert texts_of(client, first["session_id"]) == ["one", "one!", "two", "two!"]
    session = client.get(f"/v1/sessions/{first['session_id']}").json()
    assert session["turns"] == 2
    assert session["metadata"] == {"a": "b"}


def test_exact_tokens_of_an_answer_are_neither_shown_nor_taken(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    job = submit(client, session={})
    worker.succeed(worker.begin(job["id"]), "Three.", token_ids=[5, 6])
    page = client.get(f"/v1/sessions/{job['session_id']}/messages").json()
    shown = {"turn", "role", "content", "job_id", "created_at"}
    assert [set(message) for message in page["data"]] == [shown, shown]
    assert client.get(f"/v1/jobs/{job['id']}").json()["result"]["token_ids"] is None

    given = {"role": "assistant", "content": "Three.", "token_ids": [5, 6]}
    messages = [given, {"role": "user", "content": "And now?"}]
    response = client.post("/v1/jobs", json={"messages": messages})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "messages.0.token_ids"


def test_messages_come_page_by_page(client: httpx2.Client, worker: PlayedWorker) -> None:
    session_id = conversation(client, worker, "one", "two")
    seen, cursor = [], None
    while True:
        params = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = client.get(f"/v1/sessions/{session_id}/messages", params=params).json()
        seen += [(message["turn"], message["role"]) for message in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == [(1, "user"), (1, "assistant"), (2, "user"), (2, "assistant")]


def test_a_fork_goes_on_from_an_earlier_turn(client: httpx2.Client, worker: PlayedWorker) -> None:
    session_id = conversation(client, worker, "one", "two")
    response = client.post(f"/v1/sessions/{session_id}/fork", json={"at_turn": 1})
    assert response.status_code == 201
    fork = response.json()
    assert fork["forked_from"] == session_id
    assert texts_of(client, fork["id"]) == ["one", "one!"]
    job = submit(client, prompt="another", session_id=fork["id"])
    assert job["turn"] == 2
    worker.answer(job["id"])
    assert texts_of(client, session_id) == ["one", "one!", "two", "two!"]


def test_a_fork_without_a_body_takes_the_whole_history(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    session_id = conversation(client, worker, "one")
    fork = client.post(f"/v1/sessions/{session_id}/fork").json()
    assert texts_of(client, fork["id"]) == ["one", "one!"]


def test_a_fork_at_a_turn_that_is_not_there_is_refused(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    session_id = conversation(client, worker, "one")
    response = client.post(f"/v1/sessions/{session_id}/fork", json={"at_turn": 2})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "at_turn"


def test_a_deleted_session_is_gone_and_its_turns_are_cancelled(
    client: httpx2.Client, worker: PlayedWorker
) -> None:
    session_id = conversation(client, worker, "one")
    running = submit(client, prompt="two", session_id=session_id)
    waiting = submit(client, prompt="three", session_id=session_id)
    claim = worker.begin(running["id"])
    assert client.delete(f"/v1/sessions/{session_id}").status_code == 204
    assert client.get(f"/v1/sessions/{session_id}").status_code == 404
    assert client.get(f"/v1/sessions/{session_id}/messages").status_code == 404
    assert client.get("/v1/sessions").json()["data"] == []
    assert client.get(f"/v1/jobs/{waiting['id']}").json()["status"] == "cancelled"
    worker.stop(claim)
    assert client.get(f"/v1/jobs/{running['id']}").json()["status"] == "cancelled"
    until(lambda: worker.courier.redis.get(f"visq:job:{waiting['id']}"), 10, "its result")


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", ""), ("DELETE", ""), ("GET", "/messages"), ("POST", "/fork")],
)
def test_an_unknown_session_is_not_found(client: httpx2.Client, method: str, path: str) -> None:
    response = client.request(method, f"/v1/sessions/ses_{'0' * 32}{path}")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_a_turn_of_an_unknown_session_is_not_found(client: httpx2.Client) -> None:
    body = {"prompt": "x", "session_id": f"ses_{'0' * 32}"}
    response = client.post("/v1/jobs", json=body)
    assert response.status_code == 404
    assert response.json()["error"]["param"] == "session_id"
