"""Sessions over HTTP: a server keeps the state of a text, so that a turn sends and reads its new text alone.

    retnet serve out/demo                                   # in another terminal
    python examples/sessions_http.py http://127.0.0.1:8000

Standard library only. With API keys, add the header `Authorization: Bearer KEY`.
"""

import json
import sys
import urllib.request


def call(method, url, body=None):
    """The JSON of a response. An error of the server raises HTTPError, whose body says what is accepted."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def turn(server, prompt, session=None, max_tokens=40):
    """A completion whose state the server keeps: the text, and what the response says about the session."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "seed": 1, "keep_session": True}
    body |= {"session_id": session} if session else {}
    response = call("POST", f"{server}/v1/completions", body)
    return response["choices"][0]["text"], response["session"]


def main(server):
    text, session = turn(server, "def area(radius):\n")
    print(f"first turn: {session['tokens']} tokens kept in {session['id']}\n{text}\n")

    text, session = turn(server, "\n\ndef volume(radius):\n", session["id"])
    print(f"second turn: {session['reused_tokens']} of {session['tokens']} tokens were not read again\n{text}\n")

    fork = call("POST", f"{server}/v1/sessions/{session['id']}/fork")
    for name, prompt in ((session["id"], "\n# tests\n"), (fork["id"], "\nclass Circle:\n")):
        text, after = turn(server, prompt, name)
        print(f"{prompt.strip()!r} continues {name}: {after['tokens']} tokens\n{text}\n")

    for kept in call("GET", f"{server}/v1/sessions")["data"]:
        print(f"{kept['id']}: {kept['tokens']} tokens, {kept['bytes']:,} bytes")
        call("DELETE", f"{server}/v1/sessions/{kept['id']}")


if __name__ == "__main__":
    main(sys.argv[1])
