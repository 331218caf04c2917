"""Many mutants in one compilation: each place that is changed becomes `(mutant 7 ? (changed) : (as it is))`.

    n += stride;   ->   (gmk_mutant(7) ? (n -= stride) : (n += stride));

Code generation is most of what a mutant costs, and this pays for it once for some dozens. It does where the change is
inside an expression that is computed at run time. Types, template arguments, sizes of arrays and the like have to be
constants: the compiler says so, and those mutants are compiled one by one. Whatever survives here is looked at alone,
too.

The same places, each with `(gmk_mutant_seen(7), (as it is))`, tell which tests come by: no other one can notice it.
"""

import re

from .source import Source

_ASSIGN = re.compile(r"(<<|>>|[-+*/%&|^])?=")
_STOPS = {";", ",", "{", "}", "?", ":"}
_PLACE = re.compile(r"([^\s:,]+):(\d+):\d+:\s+(error|required|note)")
_HEADS = {"if", "for", "while", "switch", "constexpr"}

NUMBERS = 1 << 14  # of mutants of one source, at most

# Declared const: what is alive does not change while a kernel runs, so that it may be read once for a whole loop. Not
# instrumented: the emulator knows nothing of these variables.
PRELUDE = """
extern "C" {
__attribute__((weak, visibility("default"))) unsigned char gmk_mutants_alive[NUMBERS] = {0};
__attribute__((weak, visibility("hidden"), noinline, const, no_sanitize("thread"))) int gmk_mutant(int n) {
  return gmk_mutants_alive[n];
}
__attribute__((weak, visibility("default"))) unsigned char gmk_mutants_seen[NUMBERS] = {0};
__attribute__((weak, visibility("hidden"), noinline, no_sanitize("thread"))) void gmk_mutant_seen(int n) {
  gmk_mutants_seen[n] = 1;
}
}
""".replace("NUMBERS", str(NUMBERS))


class Schema:
    """One source, and the mutants of it that can stand side by side."""

    def __init__(self, text):
        self.text, self.source = text, Source(text)
        self.at = {t.start: i for i, t in enumerate(self.source.tokens)}
        self.until = {t.end: i for i, t in enumerate(self.source.tokens)}
        self.around = self._around()

    def _around(self):
        """For each token, the opening bracket it is in, or -1; a bracket is in what its pair is in."""
        around, stack = [], []
        for i, token in enumerate(self.source.tokens):
            if token.kind == "mark" and token.text in ")]}":
                stack.pop()
            around.append(stack[-1] if stack else -1)
            if token.kind == "mark" and token.text in "([{":
                stack.append(i)
        return around

    def segment(self, m):
        """(start, end) in the text of the expression that the mutant changes, or None."""
        s = self.source
        try:
            low = min(self.at[start] for start, _, _ in m.edits)
            high = max(self.until[end] for _, end, _ in m.edits)
        except KeyError:
            return None
        if s.scope[low] == "-" or m.operator == "narrow":
            return None
        chains = [self._chain(low), self._chain(high)]
        level = next(b for b in chains[0] if b in chains[1])
        while self.around[low] != level:
            low = self.around[low]
        while self.around[high] != level:
            high = s.match[self.around[high]]
        if level != -1 and any(s[k] == "," and self.around[k] == level for k in range(low, high)):
            low, high = level, s.match[level]  # two arguments: their call is the expression
        while not self._begins(low):
            low = s.match[low - 1] if s[low - 1] in (")", "]", "}") else low - 1
        # `x -= a ? b : c` is one expression, but `a ? b : c` in the place of `x -= a` would be another one
        stops = _STOPS - {"?", ":"} if self._assigns(low, high) else _STOPS
        while not (s[high + 1] in (")", "]") or s[high + 1] in stops or _ASSIGN.fullmatch(s[high + 1])):
            high = s.match[high + 1] if s[high + 1] in ("(", "[", "{") else high + 1
        start, end = s.tokens[low].start, s.tokens[high].end
        return None if re.search(r"^\s*#", self.text[start:end], re.M) else (start, end)

    def _assigns(self, low, high):
        return any(_ASSIGN.fullmatch(self.source[i]) and self.around[i] == self.around[low]
                   for i in range(low, high + 1))

    def _chain(self, i):
        chain = [self.around[i]]
        while chain[-1] != -1:
            chain.append(self.around[chain[-1]])
        return chain

    def _begins(self, i):
        s, before = self.source, self.source[i - 1]
        if before in ("(", "[", "", "return", "else", "do") or before in _STOPS or _ASSIGN.fullmatch(before):
            return True
        return before == ")" and s[s.match[i - 1] - 1] in _HEADS

    def render(self, some):
        """The text with all of `some`, [(number, mutant)], in it; {line: numbers that changed it}. Those whose
        expressions overlap without being one inside the other are left out, and are not among the numbers."""
        chosen = self._chosen(some)
        lines = {}
        for (start, end), here in chosen.items():
            for line in range(self.text.count("\n", 0, start) + 1, self.text.count("\n", 0, end) + 2):
                lines.setdefault(line, set()).update(number for number, _ in here)
        return self._with(0, len(self.text), chosen, self._mutants, outside=True), lines

    def marked(self, some):
        """The same for marks: each is on a line of its own, so that the compiler's complaint is of that one."""
        chosen = self._chosen(some)
        text = self._with(0, len(self.text), chosen, self._marks, outside=True)
        lines, last = {}, set()
        for i, line in enumerate(text.split("\n"), 1):
            last = set(map(int, re.findall(r"gmk_mutant_seen\((\d+)\)", line))) or last
            lines[i] = last
        return text, lines

    def _chosen(self, some):
        chosen = {}
        for number, m in some:
            place = self.segment(m)
            if place and all(_apart(place, other) for other in chosen):
                chosen.setdefault(place, []).append((number, m))
        return chosen

    def _with(self, start, end, chosen, around, outside=False):
        inner = sorted(((a, b) for a, b in chosen if start <= a and b <= end and (outside or (a, b) != (start, end))),
                       key=lambda p: (p[0], -p[1]))
        text, at = "", start
        for a, b in inner:
            if a >= at:
                text += self.text[at:a] + self._with(a, b, chosen, around)
                at = b
        text += self.text[at:end]
        return text if outside else around(chosen[start, end], start, end, text)

    def _mutants(self, here, start, end, text):
        changed = [(n, self._changed(m, start, end)) for n, m in here]
        void = "" if all(new for _, new in changed) else "(void)"  # a call that is deleted: nobody wants its value
        choices = "".join(f"gmk_mutant({n}) ? {void}({new or 0}) : " for n, new in changed)
        return f"({choices}{void}({text}))"

    def _marks(self, here, start, end, text):
        return f"(\n{' '.join(f'gmk_mutant_seen({n}),' for n, _ in here)}\n({text}))"

    def _changed(self, m, start, end):
        text = self.text[:end]
        for a, b, new in sorted(m.edits, reverse=True):
            text = text[:a] + new + text[b:]
        text = re.sub(r"//[^\n]*", "", text[start:])
        return re.sub(r"\s*\n\s*", " ", text).strip()


def blamed(complaints, path, lines):
    """The numbers of the mutants that g++ complains of; `lines` from render."""
    named = re.findall(r"\(gmk_mutant\((\d+)\) != 0\) \?", complaints)  # in a type: an array of so many
    if named:
        return set(map(int, named))
    errors, around = set(), set()
    for file, line, kind in _PLACE.findall(complaints):
        if file == str(path):
            (errors if kind == "error" else around).update(lines.get(int(line), ()))
    return errors or around


def overlap(a, b):
    return a[0] < b[1] and b[0] < a[1]


def _apart(a, b):
    """One inside the other, or side by side."""
    inside = a[0] <= b[0] and b[1] <= a[1] or b[0] <= a[0] and a[1] <= b[1]
    return inside or not overlap(a, b)
