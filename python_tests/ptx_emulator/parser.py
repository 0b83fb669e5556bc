"""PTX text to instructions: what nvcc emits for our kernels, inline assembly included; not the whole language."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class UnsupportedPtx(Exception):
    """The text uses something that the emulator does not know; the message names it."""


@dataclass(frozen=True)
class Register:
    name: str  # unique in the kernel: a register of an inner scope carries the scope's number
    type: str  # as declared: "b32", "f32", "pred", ...


@dataclass(frozen=True)
class Immediate:
    value: int  # raw bits for a float
    float_bits: int | None = None  # 32 or 64 for 0f... and 0d..., None for an integer


@dataclass(frozen=True)
class Symbol:
    name: str  # a variable, a parameter, a label, a special register


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class TensorAddress:
    map: Operand  # [%rd1, {%r1, %r2}]
    coordinates: tuple[Operand, ...]  # the fastest first


@dataclass(frozen=True)
class Negated:
    operand: Operand  # !%p


@dataclass(frozen=True)
class Pair:
    first: Operand  # %p1|%p2
    second: Operand


Operand = Register | Immediate | Symbol | Vector | Address | TensorAddress | Negated | Pair


@dataclass
class Instruction:
    text: str
    opcode: str  # up to the first dot
    modifiers: list[str]
    operands: list[Operand]
    guard: Register | None
    guard_negated: bool
    index: int

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def has(self, modifier: str) -> bool:
        return modifier in self.modifiers

    def one_of(self, *choices: str) -> str | None:
        return next((m for m in self.modifiers if m in choices), None)


@dataclass
class Variable:
    name: str
    space: str
    size: int  # 0 for an extern array: the launch decides
    align: int
    initial: bytes = b""


@dataclass
class Parameter:
    name: str
    size: int
    offset: int


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Parameter]
    max_threads: int | None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)  # .shared and .local of the body

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters.values()), default=0)


class Module:
    """A file's kernels, each parsed when it is first asked for: one source has dozens and a test runs a few."""

    def __init__(self, texts: dict[str, tuple[str, str]], variables: dict[str, Variable]):
        self._texts = texts  # header and body by name
        self._kernels: dict[str, Kernel] = {}
        self.variables = variables  # .shared, .global, .const outside kernels

    @property
    def names(self) -> list[str]:
        return list(self._texts)

    def kernel(self, name: str) -> Kernel:
        if name not in self._kernels:
            self._kernels[name] = _parse_kernel(*self._texts[name])
        return self._kernels[name]


TYPE_BYTES = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)} | {"b128": 16}
TYPE_BYTES |= {"f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4}
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)?\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$%]+)(?P<array>(?:\[\d*\])*)\s*(?:=\s*(?P<init>.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$")
_POINTER = re.compile(r"\.ptr\b(?:\s+\.(?:global|shared|const|local))?(?:\s+\.align\s+\d+)?")  # a hint on a parameter
_INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_HEADER = re.compile(r"^\s*(?:\.(?:visible|weak|extern)\s+)?\.(entry|func)\b([^{;]*)([{;])", re.MULTILINE)
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9]\d*)U?$")


def parse(text: str) -> Module:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\.(?:loc|file|version|target|address_size)\b.*$", "", text, flags=re.MULTILINE)
    kernels: dict[str, tuple[str, str]] = {}
    outside = []
    position = 0
    for header in _HEADER.finditer(text):
        if header.start() < position:
            continue
        outside.append(text[position : header.start()])
        position = header.end()
        if header[3] == ";":
            continue  # a declaration
        end = _closing_brace(text, header.end())
        if header[1] == "entry":
            name = re.match(r"\s*([\w$]+)", header[2])
            assert name
            kernels[name[1]] = header[2], text[header.end() : end]
        position = end + 1
    outside.append(text[position:])
    declared = (_VARIABLE.match(statement.strip()) for part in outside for statement in part.split(";"))
    variables = [_variable(match) for match in declared if match]
    return Module(kernels, {variable.name: variable for variable in variables})


def _closing_brace(text: str, start: int) -> int:
    end = start
    while True:
        end = text.find("}", text.find("\n}", end))  # a body's brace starts a line; so may one of inline assembly
        if end < 0:
            raise UnsupportedPtx("unbalanced braces")
        if text.count("{", start, end) == text.count("}", start, end):
            return end
        end += 1


def _variable(match: re.Match[str]) -> Variable:
    width = TYPE_BYTES[match["type"]]
    count = 1
    for extent in re.findall(r"\[(\d*)\]", match["array"]):
        count *= int(extent or 0)
    initial = b""
    if match["init"]:
        values = [value.strip() for value in match["init"].strip().strip("{}").split(",")]
        for value in values:
            if not _NUMBER.match(value) and not value.startswith(("0f", "0d")):
                raise UnsupportedPtx(f"initialiser {value} of {match['name']}")
            bits = int(value[2:], 16) if value.startswith(("0f", "0d")) else _integer(value)
            initial += (bits % (1 << 8 * width)).to_bytes(width, "little")
    return Variable(match["name"], match[1], width * count, int(match[2] or width), initial)


def _integer(text: str) -> int:
    text = text.rstrip("U")
    negative = text.startswith("-")
    digits = text.lstrip("-")
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
    value = int(digits, 8) if octal else int(digits, 0)
    return -value if negative else value


def _parse_kernel(header: str, body: str) -> Kernel:
    match = re.match(r"\s*([\w$]+)\s*(?:\((.*?)\))?(.*)$", header, re.DOTALL)
    assert match
    parameters: dict[str, Parameter] = {}
    offset = 0
    for declaration in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        parameter = _PARAMETER.match(" ".join(_POINTER.sub("", declaration).split()))
        if not parameter:
            raise UnsupportedPtx(f"parameter declaration {declaration!r}")
        width = TYPE_BYTES[parameter[2]]
        align = int(parameter[1] or width)
        offset = -(-offset // align) * align
        size = width * int(parameter[4] or 1)
        parameters[parameter[3]] = Parameter(parameter[3], size, offset)
        offset += size
    bound = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", match[3])
    max_threads = None
    if bound:
        max_threads = 1
        for extent in bound[1].split(","):
            max_threads *= int(extent)
    kernel = Kernel(match[1], parameters, max_threads)
    _BodyParser(kernel).parse(body)
    return kernel


class _BodyParser:
    """Splits a body into statements. Inline assembly opens scopes, whose labels and registers may shadow outer ones."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scopes: list[tuple[str, dict[str, Register], dict[str, str]]] = [("", {}, {})]
        self.opened = 0

    def parse(self, body: str) -> None:
        body = re.sub(r"(\$?[A-Za-z_][\w$]*)\s*:(?!:)", r"\1:;", body)
        statements = [self._strip_scopes(statement) for statement in body.split(";")]
        # Operands last, when all labels are known: a branch may go forward.
        pending: list[tuple[list[tuple[str, dict[str, Register], dict[str, str]]], str]] = []
        for braces, statement in statements:
            for brace in braces:
                if brace == "{":
                    self.opened += 1
                    self.scopes.append((f"@{self.opened}", {}, {}))
                elif len(self.scopes) > 1:
                    self.scopes.pop()
            if not statement:
                continue
            label = re.fullmatch(r"([\w$]+):", statement)
            suffix, registers, labels = self.scopes[-1]
            if label:
                labels[label[1]] = label[1] + suffix
                self.kernel.labels[label[1] + suffix] = len(pending)
            elif statement.startswith(".reg"):
                self._declare_registers(statement, suffix, registers)
            elif targets := re.match(r"\.branchtargets\s+(.*)", statement, re.DOTALL):
                name = next(reversed(self.kernel.labels))  # the label in front of the directive names the table
                self.kernel.branch_targets[name] = [target.strip() for target in targets[1].split(",")]
            elif variable := _VARIABLE.match(statement):
                declared = _variable(variable)
                self.kernel.variables[declared.name] = declared
            elif statement.startswith(".pragma"):
                continue
            elif statement.startswith("."):
                raise UnsupportedPtx(f"directive {statement!r}")
            else:
                pending.append((list(self.scopes), statement))
        self.kernel.instructions = [
            self._instruction(scopes, statement, index) for index, (scopes, statement) in enumerate(pending)
        ]

    @staticmethod
    def _strip_scopes(statement: str) -> tuple[str, str]:
        statement = statement.strip()
        braces = ""
        while statement and statement[0] in "{}":
            braces += statement[0]
            statement = statement[1:].strip()
        return braces, " ".join(statement.split())

    @staticmethod
    def _declare_registers(statement: str, suffix: str, registers: dict[str, Register]) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", statement)
        if not match:
            raise UnsupportedPtx(f"register declaration {statement!r}")
        for name in (part.strip() for part in match[2].split(",")):
            counted = re.fullmatch(r"([%\w$]+)<(\d+)>", name)
            names = [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]
            for single in names:
                registers[single] = Register(single + suffix, match[1])

    def _instruction(self, scopes, statement: str, index: int) -> Instruction:
        match = _INSTRUCTION.match(statement)
        if not match:
            raise UnsupportedPtx(f"statement {statement!r}")
        guard = None
        if match[2]:
            guard = self._name(scopes, match[2])
            if not isinstance(guard, Register):
                raise UnsupportedPtx(f"guard of {statement!r}")
        opcode, *modifiers = match[3].split(".")
        try:
            operands = [self._operand(scopes, part) for part in _split(match[4])] if opcode != "call" else []
        except UnsupportedPtx as error:
            raise UnsupportedPtx(f"{error} of `{statement}`") from error
        return Instruction(statement, opcode, modifiers, operands, guard, match[1] == "!", index)

    def _name(self, scopes, name: str) -> Register | Symbol:
        for _, registers, labels in reversed(scopes):
            if name in registers:
                return registers[name]
            if name in labels:
                return Symbol(labels[name])
        return Symbol(name)

    def _operand(self, scopes, text: str) -> Operand:
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self._operand(scopes, part) for part in _split(text[1:-1])))
        if text.startswith("[") and "{" in text:
            where, coordinates = _split(text[1:-1])
            return TensorAddress(
                self._operand(scopes, f"[{where}]"),
                tuple(self._operand(scopes, c) for c in _split(coordinates.strip()[1:-1])),
            )
        if text.startswith("["):
            match = re.fullmatch(r"([%\w$.]+)\s*(?:\+\s*(-?\w+)|(-\s*\d+))?", text[1:-1].strip())
            if not match:
                raise UnsupportedPtx(f"address {text}")
            offset = _integer(match[2]) if match[2] else int(match[3].replace(" ", "")) if match[3] else 0
            return Address(self._operand(scopes, match[1]), offset)
        if text.startswith("!"):
            return Negated(self._operand(scopes, text[1:]))
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(scopes, first), self._operand(scopes, second))
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            return Immediate(int(text[2:], 16), 32)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            return Immediate(int(text[2:], 16), 64)
        if _NUMBER.match(text):
            return Immediate(_integer(text))
        if re.fullmatch(r"[%\w$.]+", text):
            return self._name(scopes, text)
        raise UnsupportedPtx(f"operand {text}")


def _split(text: str) -> list[str]:
    if "{" not in text and "[" not in text:
        return text.split(",") if text.strip() else []
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current)
    return parts
