"""A C++ source as a list of tokens: enough grammar to plant a bug, no compiler.

What the emulator does not compile (the other side of `#ifdef GMK_SIMT`), comments and preprocessor lines: no tokens.
clang-format has been over the sources, so blanks tell operators apart: `a < b` compares, `f<T>` does not.
"""

import re
from dataclasses import dataclass

DEFINED = {"GMK_SIMT", "__cplusplus"}
_TOKEN = re.compile(r"""
    (?P<skip>\s+|//[^\n]*|/\*.*?\*/)
  | (?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
  | (?P<string>(?:u8|[uUL])?"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])+')
  | (?P<number>\.?\d(?:[eEpP][+-]|['\w.])*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<mark><<=|>>=|\.\.\.|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||::|[-+*/%&|^]=|.)
""", re.X | re.S | re.M)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_NO_FUNCTION = {"__launch_bounds__", "__attribute__", "alignas", "decltype", "noexcept", "sizeof"}


@dataclass(frozen=True)
class Token:
    kind: str  # "name", "number", "string", "mark"
    text: str
    start: int
    end: int
    line: int  # from 1
    spaced: bool  # blanks on both sides


class Source:
    """tokens; match: index of a bracket -> index of its partner; scope: index -> function or type that it is in."""

    def __init__(self, text):
        self.text = text
        self.lines = text.split("\n")
        self.tokens = list(_tokens(text))
        self.match = _match(self.tokens)
        self.scope = _scopes(self.tokens, self.match)

    def text_of(self, first, last):
        """The text of tokens first to last, the last one included."""
        return self.text[self.tokens[first].start : self.tokens[last].end]

    def __getitem__(self, i):
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""


def _tokens(text):
    active, line, at = [True], 1, 0
    taken = []  # has a branch of each open #if been compiled?
    while at < len(text):
        m = _TOKEN.match(text, at)
        kind, word = m.lastgroup, m.group()
        if kind == "directive":
            _directive(word.strip(), active, taken)
        elif kind != "skip" and all(active):
            blank = text[at - 1 : at].isspace() and text[m.end() : m.end() + 1].isspace()
            yield Token(kind, word, at, m.end(), line, blank)
        line += word.count("\n")
        at = m.end()


def _directive(line, active, taken):
    word, _, rest = line.lstrip("# ").partition(" ")
    if word in ("ifdef", "ifndef", "if"):
        holds = rest.split()[0] in DEFINED if word != "if" else _holds(rest)
        holds = holds != (word == "ifndef")
        active.append(holds)
        taken.append(holds)
    elif word in ("elif", "else"):
        active[-1] = not taken[-1] and (word == "else" or _holds(rest))
        taken[-1] |= active[-1]
    elif word == "endif":
        active.pop()
        taken.pop()


def _holds(condition):
    """The value of an #if; a macro that is not in DEFINED is 0, as in C."""
    condition = re.sub(r"//.*|/\*.*?\*/|\\\n", " ", condition)
    condition = re.sub(r"defined\s*\(?\s*(\w+)\s*\)?", lambda m: str(int(m[1] in DEFINED)), condition)
    condition = re.sub(r"\b[A-Za-z_]\w*", "0", condition)
    condition = re.sub(r"!(?!=)", " not ", condition).replace("&&", " and ").replace("||", " or ")
    return bool(eval(condition, {"__builtins__": {}}))


def _match(tokens):
    match, stack = {}, []
    for i, token in enumerate(tokens):
        if token.kind != "mark":
            continue
        if token.text in _PAIRS:
            stack.append(i)
        elif token.text in _PAIRS.values():
            match[i] = stack.pop()
            match[match[i]] = i
    return match


def _scopes(tokens, match):
    scope = ["-"] * len(tokens)
    start, i = 0, 0
    while i < len(tokens):
        text = tokens[i].text
        if text in "([":
            i = match[i]
        elif text == "{":
            head = [t.text for t in tokens[start:i]]
            name, is_type = _named(tokens, match, start, i)
            if name and not is_type:  # a function: all of it, from the head on
                scope[start : match[i] + 1] = [name] * (match[i] + 1 - start)
                i = match[i]
                start = i + 1
            elif name:  # a type: its members, methods keep their own names
                end = match[i]
                for k in range(start, end + 1):
                    scope[k] = name
                inner = _scopes(tokens[i + 1 : end], {k - i - 1: v - i - 1 for k, v in match.items() if i < k < end})
                for k, s in enumerate(inner):
                    scope[i + 1 + k] = name if s == "-" else f"{name}::{s}"
                i = end
                start = i + 1
            elif "=" in head:  # an initialiser
                i = match[i]
            else:  # a namespace
                start = i + 1
        elif text in (";", "}"):
            start = i + 1
        i += 1
    return scope


def _named(tokens, match, start, end):
    """The name of the function or type whose `{` is at `end`, and whether it is a type."""
    k = start
    while k < end:
        text = tokens[k].text
        if text == "template":
            k = _after_angles(tokens, k + 1)
            continue
        if text in ("struct", "class", "enum", "union"):
            k += 2 if tokens[k + 1].text == "class" else 1
            while tokens[k].text in _NO_FUNCTION:  # struct alignas(16) Pack
                k = match[k + 1] + 1
            return tokens[k].text if tokens[k].kind == "name" else "-", True
        if text == "=":
            return None, False
        if text == "(":
            name = tokens[k - 1].text
            if name not in _NO_FUNCTION and tokens[k - 1].kind == "name":
                return name, False
            if "operator" in [t.text for t in tokens[start:k]]:
                return "operator", False
            k = match[k]
        k += 1
    return None, False


def _after_angles(tokens, k):
    depth = 0
    while k < len(tokens):
        depth += {"<": 1, ">": -1, ">>": -2}.get(tokens[k].text, 0)
        k += 1
        if depth <= 0:
            return k
    return k
