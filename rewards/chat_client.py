"""A client for a chat model behind an OpenAI-compatible URL: retries, one deadline for all of them, and a memory."""

import hashlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cispo.errors import DeadlineError, RewardError

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0
MAX_REPLY_BYTES = 4 << 20
REMEMBERED = 20_000


@dataclass(frozen=True)
class Endpoint:
    """A model and how to ask it.

    url: up to and without /chat/completions, such as http://localhost:8000/v1. attempt_s, deadline_s: seconds that one
    attempt, and all together, may take.
    """

    url: str
    model: str
    api_key: str = ""
    max_tokens: int = 1024
    retries: int = 4
    attempt_s: float = 60.0
    deadline_s: float = 120.0


class ChatClient:
    """Answers by a model; equal requests are answered once. Many threads may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, str] = OrderedDict()

    def ask(self, endpoint: Endpoint, messages: Sequence[dict[str, str]], *, attempt: int = 0) -> str:
        """The model's answer, at temperature 0. `attempt` above 0 asks again what had no usable answer.

        Raises RewardError for a refusal or a reply of another form, DeadlineError when time is up.
        """
        body = {"model": endpoint.model, "messages": list(messages), "max_tokens": endpoint.max_tokens}
        body |= {"temperature": 0.3, "seed": attempt} if attempt else {"temperature": 0}
        data = json.dumps(body).encode()
        key = hashlib.sha256(endpoint.url.encode() + b"\0" + data).hexdigest()
        with self._lock:
            if key in self._answers:
                self._answers.move_to_end(key)
                return self._answers[key]
        answer = self._request(endpoint, data)
        with self._lock:
            self._answers[key] = answer
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
        return answer

    def _request(self, endpoint: Endpoint, data: bytes) -> str:
        ends = time.monotonic() + endpoint.deadline_s
        reason = ""
        for attempt in range(endpoint.retries + 1):
            left_s = ends - time.monotonic()
            if left_s <= 0:
                break
            try:
                return _post(endpoint, data, min(endpoint.attempt_s, left_s))
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"HTTP {error.code}: {_one_line(error.read(300).decode(errors='replace'))}"
                if error.code not in RETRIED:
                    raise RewardError(f"the model at {endpoint.url} refuses: {reason}") from error
                asked_s = error.headers.get("Retry-After", "")
            except (OSError, http.client.HTTPException) as error:
                reason, asked_s = f"{type(error).__name__}: {_one_line(str(error))}", ""
            pause_s = float(asked_s) if asked_s.isdigit() else PAUSE_S * 2**attempt * random.uniform(0.75, 1.25)
            time.sleep(max(0.0, min(pause_s, LONGEST_PAUSE_S, ends - time.monotonic())))
        if time.monotonic() >= ends:
            raise DeadlineError(f"the model at {endpoint.url} gave no answer in {endpoint.deadline_s:g} s ({reason})")
        raise RewardError(f"the model at {endpoint.url} failed {endpoint.retries + 1} times: {reason}")


def _post(endpoint: Endpoint, data: bytes, timeout_s: float) -> str:
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    url = endpoint.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        reply = response.read(MAX_REPLY_BYTES)
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        shown = _one_line(reply[:200].decode(errors="replace"))
        raise RewardError(f"the model at {endpoint.url} sent no chat completion: {shown}") from error
    if not isinstance(content, str):
        raise RewardError(f"the model at {endpoint.url} sent no text; raise max_tokens if it is still thinking")
    return content


def _one_line(text: str) -> str:
    return " ".join(text.split())
