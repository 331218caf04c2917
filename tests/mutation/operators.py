"""Mutants of a source. An operator is a generator: operator(source) yields (token, edits, what it does); the mutant is
named after the line of the token, and edits are [(start, end, new text)]."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass

from .source import Source

OPERATORS = {}
KEYWORDS = {"if", "for", "while", "switch", "return", "sizeof", "alignof", "decltype", "static_assert", "constexpr"}
# in their first two arguments
COMMUTATIVE = {"min", "max", "fmin", "fmax", "fminf", "fmaxf", "fma", "fmaf", "rn_mul", "rn_add", "rn_fma"}
COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}


@dataclass(frozen=True)
class Mutant:
    name: str  # file:function:operator:hash of the line's tokens#which; edits elsewhere do not change it
    file: str
    function: str
    operator: str
    line: int
    what: str
    edits: tuple

    def apply(self, text):
        for start, end, new in sorted(self.edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text


def mutants(file, text):
    """Every mutant of a source, in the order of the text. `file` is the name it gets in them."""
    s = Source(text)
    tokens_of = {}
    for token in s.tokens:
        tokens_of.setdefault(token.line, []).append(token.text)
    found, seen, made = [], Counter(), set()
    for operator, function in OPERATORS.items():
        found += [(i, operator, tuple(edits), what) for i, edits, what in function(s)]
    for i, operator, edits, what in sorted(found, key=lambda f: f[0]):  # stable: in the order of OPERATORS
        if edits in made:  # `i < 1` -> `i < 0` is a bound and a constant
            continue
        made.add(edits)
        line = s.tokens[i].line
        digest = hashlib.sha256(" ".join(tokens_of[line]).encode()).hexdigest()[:8]
        stem = f"{file}:{s.scope[i]}:{operator}:{digest}"
        seen[stem] += 1
        yield Mutant(f"{stem}#{seen[stem]}", file, s.scope[i], operator, line, what, edits)


def operator(function):
    OPERATORS[function.__name__.rstrip("_")] = function
    return function


# helpers -------------------------------------------------------------------------------------------------------------


def _replace(s, first, last, new):
    return [(s.tokens[first].start, s.tokens[last].end, new)]


def _forward(s, i, stops):
    """The last token of the expression that begins at i and ends before one of `stops` or an unmatched bracket."""
    k = i
    while k < len(s.tokens):
        text, spaced = s[k], s.tokens[k].spaced
        if text in "([{" and k in s.match:
            k = s.match[k]
        elif text in (")", "]", "}", ";", ",") or text in stops and (spaced or text in "?:"):
            return k - 1
        k += 1
    return k - 1


def _backward(s, i, stops):
    """The first token of the expression that ends at i."""
    k = i
    while k >= 0:
        text, spaced = s[k], s.tokens[k].spaced
        if text in ")]}" and k in s.match:
            k = s.match[k]
        elif text in _BEGIN or text in stops and spaced or re.fullmatch(r"(<<|>>|[-+*/%&|^])?=", text):
            return k + 1
        k -= 1
    return 0


_BEGIN = {"(", "[", "{", ";", ",", "return"}
_LOGIC = {"?", ":", "&&", "||"}


def _deleted_calls(pattern):
    def delete(s):
        for i, token in enumerate(s.tokens):
            statement = s[i - 1] in (";", "{", "}", ")", "else", "::")
            if token.kind != "name" or not re.fullmatch(pattern, token.text) or not statement:
                continue
            k = i + 1
            if s[k] == "<":
                while s[k] != ">":
                    k += 1
                k += 1
            if s[k] == "(" and s[s.match[k] + 1] == ";":
                first = i - 1 if s[i - 1] == "::" else i
                while s[first - 1] == "::" or first > 0 and s[first] == "::" and s.tokens[first - 1].kind == "name":
                    first -= 1
                yield i, _replace(s, first, s.match[k], ""), f"{s.text_of(first, s.match[k])} deleted"

    return delete


OPERATORS["barrier"] = _deleted_calls("__syncthreads")
OPERATORS["syncwarp"] = _deleted_calls("__syncwarp")
OPERATORS["fence"] = _deleted_calls("__threadfence(_block|_system)?")
OPERATORS["wait"] = _deleted_calls(r"\w*(async_wait|async_commit|wait_group|wait_all|commit_group)\w*")


def _compares(s, i):
    token = s.tokens[i]
    return token.kind == "mark" and token.text in COMPARISONS and token.spaced and s[i - 1] != "template"


# operators -----------------------------------------------------------------------------------------------------------


@operator
def bound(s):
    """One more, one less."""
    other = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
    step = {"<": "-", "<=": "+", ">": "+", ">=": "-"}
    for i, token in enumerate(s.tokens):
        if _compares(s, i) and token.text in other:
            yield i, _replace(s, i, i, other[token.text]), f"{token.text} -> {other[token.text]}"
            last = _forward(s, i + 1, _LOGIC | COMPARISONS)
            right = s.text_of(i + 1, last)
            one = f"{step[token.text]} 1"
            yield i, _replace(s, i + 1, last, f"({right}) {one}"), f"{right} -> {right} {one}"


@operator
def compare(s):
    other = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
    for i, token in enumerate(s.tokens):
        if _compares(s, i):
            yield i, _replace(s, i, i, other[token.text]), f"{token.text} -> {other[token.text]}"
        elif token.text == "!" and not token.spaced:
            yield i, _replace(s, i, i, ""), f"!{s[i + 1]} -> {s[i + 1]}"


@operator
def sign(s):
    other = {"+": "-", "-": "+", "+=": "-=", "-=": "+="}
    for i, token in enumerate(s.tokens):
        if token.text in other and token.kind == "mark":
            if token.spaced:
                yield i, _replace(s, i, i, other[token.text]), f"{token.text} -> {other[token.text]}"
            elif token.text == "-":
                yield i, _replace(s, i, i, ""), f"-{s[i + 1]} -> {s[i + 1]}"


@operator
def arithmetic(s):
    """A wrong operator of the same kind: quotient and remainder are the two coordinates of an index."""
    other = {"*": "+", "/": "%", "%": "/", "*=": "+=", "/=": "*=", "&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<",
             ">>=": "<<=", "<<=": ">>="}
    for i, token in enumerate(s.tokens):
        if token.kind == "mark" and token.text in other and token.spaced and s[i - 1] != "template":
            yield i, _replace(s, i, i, other[token.text]), f"{token.text} -> {other[token.text]}"


@operator
def swap(s):
    """Two indices, coordinates or arguments."""
    members = {"x": "y", "y": "x", "z": "x", "h": "w", "w": "h", "kh": "kw", "kw": "kh"}
    for i, token in enumerate(s.tokens):
        if token.text in members and token.kind == "name" and s[i - 1] in (".", "->") and s[i + 1] != "(":
            yield i, _replace(s, i, i, members[token.text]), f".{token.text} -> .{members[token.text]}"
        if token.text == "[" and s[s.match[i] + 1] == "[" and s.tokens[i - 1].kind == "name":
            a, b = (i + 1, s.match[i] - 1), (s.match[i] + 2, s.match[s.match[i] + 1] - 1)
            if a[0] <= a[1] and b[0] <= b[1] and s.text_of(*a) != s.text_of(*b):
                yield i, _exchange(s, a, b), f"[{s.text_of(*a)}] <-> [{s.text_of(*b)}]"
        if token.text in "({" and i in s.match:
            yield from _swapped_arguments(s, i)


def _exchange(s, a, b):
    return _replace(s, *a, s.text_of(*b)) + _replace(s, *b, s.text_of(*a))


def _swapped_arguments(s, opening):
    name = s[opening - 1]
    if s.tokens[opening - 1].kind != "name" or name in KEYWORDS or name.isupper():
        return
    arguments, k = [], opening + 1
    while k < s.match[opening]:
        last = _forward(s, k, ())
        arguments.append((k, last))
        k = last + 2
        if s[last + 1] == ";":
            return  # a block
    for first, last in arguments:
        if last < first or any(s.tokens[j].kind == s.tokens[j + 1].kind == "name" for j in range(first, last)):
            return  # a declaration
    for n, (a, b) in enumerate(zip(arguments, arguments[1:], strict=False)):
        if s.text_of(*a) != s.text_of(*b) and not (n == 0 and name in COMMUTATIVE):
            yield a[0], _exchange(s, a, b), f"{name}: {s.text_of(*a)} <-> {s.text_of(*b)}"


@operator
def narrow(s):
    other = {"int64_t": "int32_t", "uint64_t": "uint32_t", "size_t": "uint32_t"}
    for i, token in enumerate(s.tokens):
        if token.text in other:
            yield i, _replace(s, i, i, other[token.text]), f"{token.text} -> {other[token.text]}, before {s[i + 1]}"


@operator
def constant(s):
    for i, token in enumerate(s.tokens):
        if token.kind != "number":
            continue
        number = r"(0[xX][\da-fA-F'.]+(?:[pP][-+]?\d+)?|[\d.']+(?:[eE][-+]?\d+)?)(\w*)"
        digits, suffix = re.fullmatch(number, token.text).groups()
        if re.fullmatch(r"[\d']+|0[xX][\da-fA-F']+", digits):
            value = int(digits.replace("'", ""), 0)
            news = {0: [1], 1: [0, 2]}.get(value, [value + 1, value - 1])
            if digits[:2] in ("0x", "0X"):
                news = [value ^ 1, value ^ 1 << (value.bit_length() - 1)]
                if token.text.lower().startswith("0xffffffff"):
                    continue  # a shuffle mask: that is another operator
        else:
            value = float.fromhex(digits) if digits[:2] in ("0x", "0X") else float(digits)
            news = ["1.0"] if value == 0 else [f"(2 * {digits}{suffix})"]
        for new in news:
            new = new if isinstance(new, str) and "(" in new else f"{new}{suffix}"
            yield i, _replace(s, i, i, new), f"{token.text} -> {new}"


@operator
def mask(s):
    for i, token in enumerate(s.tokens):
        if token.text in ("kFullWarp", "0xffffffff", "0xffffffffu", "0xFFFFFFFFu") and s[i + 1] != "=":
            for new in ("0x0000ffffu", "0xfffffffeu"):
                yield i, _replace(s, i, i, new), f"{token.text} -> {new}"


def _conditions(s):
    """(token, first, last) of each condition of an if, while or for."""
    for i, token in enumerate(s.tokens):
        opening = i + 2 if s[i + 1] == "constexpr" else i + 1
        if token.text not in ("if", "while", "for") or s[opening] != "(":
            continue
        first, last = opening + 1, s.match[opening] - 1
        if token.text == "for":
            parts = [k for k in range(first, last) if s[k] == ";"]
            if len(parts) != 2 or parts[1] == parts[0] + 1:
                continue
            first, last = parts[0] + 1, parts[1] - 1
        if not any(s[k] == "=" for k in range(first, last + 1)):
            yield i, first, last


@operator
def drop(s):
    """What is done under a condition, or in a loop, is not done: a lost tail."""
    for i, first, last in _conditions(s):
        yield i, _replace(s, first, last, "false"), f"{s[i]} ({s.text_of(first, last)}) -> false"


@operator
def guard(s):
    """An if without its if; one part of a condition less."""
    for i, first, last in _conditions(s):
        if s[i] == "if":
            yield i, _replace(s, first, last, "true"), f"if ({s.text_of(first, last)}) -> true"
    for i, token in enumerate(s.tokens):
        if token.text in ("&&", "||") and token.spaced:
            neutral = "true" if token.text == "&&" else "false"
            left = _backward(s, i - 1, _LOGIC)
            right = _forward(s, i + 1, _LOGIC)
            if s[left - 1] != token.text:
                yield i, _replace(s, left, i - 1, neutral), f"{s.text_of(left, i - 1)} -> {neutral}"
            yield i, _replace(s, i + 1, right, neutral), f"{s.text_of(i + 1, right)} -> {neutral}"


@operator
def choice(s):
    """Always the same side of `condition ? a : b`."""
    for i, token in enumerate(s.tokens):
        if token.text == "?":
            first = _backward(s, i - 1, {"?", ":"})
            for new in ("true", "false"):
                yield i, _replace(s, first, i - 1, new), f"{s.text_of(first, i - 1)} ? -> {new} ?"
