#!/usr/bin/env python3
"""Tests of the corpus: python3 xtask/data/test_corpus.py"""
import json
import pathlib
import sys
import tempfile
import unittest
import zipfile

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import corpus  # noqa: E402
import prompts  # noqa: E402
import tasks  # noqa: E402

CODE = '"""' + "What this module is for, said at some length. " * 6 + '"""\n\n\ndef double(x):\n    return 2 * x\n' + "\n".join(
    f"\n\ndef name_{i}(value):\n    other = double(value)\n    return other + {i}" for i in range(12))


def make_wheel(folder, name, version, metadata, files):
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", metadata)
        for file, text in files.items():
            wheel.writestr(file, text)
    return name, version, corpus.sha256(path.read_bytes())


class Prompts(unittest.TestCase):
    def setUp(self):
        held = tempfile.TemporaryDirectory()
        self.addCleanup(held.cleanup)
        self.corpus = pathlib.Path(held.name)
        prose = "\n\n".join(f"Passage {'abcdefghij'[i]} tells of something. " + "It goes on for a while and says little. " * 8 for i in range(10))
        (self.corpus / "papers.txt").write_text(prose.replace(". \n", ".\n").strip())
        code = "\n\n".join(f'def f{i}(x):\n    """Doubles what it is given, {i} times over."""\n' + "    x = 2 * x\n" * 6 + "    return x" for i in range(9))
        (self.corpus / "python.txt").write_text(code + "\n<|endoftext|>\nthis is no Python(")
        (self.corpus / "rust.txt").write_text("pub fn twice(x: u32) -> u32 {\n" + "    let x = x + 1;\n" * 6 + "    2 * x\n}\n")
        (self.corpus / "questions.jsonl").write_text("".join(
            json.dumps({"id": str(i), "messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": "No."}]}) + "\n"
            for i in range(20)))

    def test_every_task_comes_in_equal_parts_and_nothing_twice(self):
        made = prompts.compose(self.corpus, 60, 0)
        self.assertEqual(len({m["messages"][0]["content"] for m in made}), 60)
        self.assertEqual(len({m["id"] for m in made}), 60)
        for head in (6, 30, 60):
            tasks = [m["task"] for m in made[:head]]
            self.assertEqual({tasks.count(t) for t in tasks}, {head // 6})
            self.assertEqual(len(set(tasks)), 6)
        self.assertTrue(all(m["messages"][0]["role"] == "user" and len(m["messages"]) == 1 for m in made))
        self.assertFalse(any("{" + k + "}" in m["messages"][0]["content"] for m in made for k in "abpctkslnmfd"))

    def test_the_same_seed_gives_the_same_and_another_another(self):
        self.assertEqual(prompts.compose(self.corpus, 30, 1), prompts.compose(self.corpus, 30, 1))
        texts = [[m["messages"][0]["content"] for m in prompts.compose(self.corpus, 30, seed)] for seed in (1, 2)]
        self.assertNotEqual(*texts)

    def test_what_the_corpus_cannot_give_is_said(self):
        with self.assertRaisesRegex(SystemExit, "different questions were wanted"):
            prompts.compose(self.corpus, 100_000, 0)
        (self.corpus / "rust.txt").unlink()
        with self.assertRaisesRegex(SystemExit, "no Rust functions"):
            prompts.compose(self.corpus, 6, 0)


class Corpus(unittest.TestCase):
    def setUp(self):
        corpus.Part.seen = set()
        self.held = tempfile.TemporaryDirectory()
        self.work = pathlib.Path(self.held.name)
        (self.work / "wheels").mkdir()
        self.addCleanup(self.held.cleanup)

    def test_documents_and_paragraphs_come_once(self):
        part = corpus.Part("a")
        text = "\n\n".join(f"Paragraph {i}, " + "which is long enough to be told from the others. " * 3 for i in range(3))
        self.assertGreater(part.add(text), 0)
        self.assertEqual(corpus.Part("b").add(text), 0)
        self.assertGreater(part.add(text + "\n\n" + "Something that was not there before, and goes on for a while. " * 4), 0)
        self.assertNotIn("Paragraph", part.documents[1])
        self.assertEqual(part.add_talk("2 + 2?", "4"), 7)
        self.assertEqual(part.add_talk("2 + 2?", "4"), 0)

    def test_text_has_plain_line_ends_and_no_separator_of_its_own(self):
        self.assertEqual(corpus.normalised("a \r\n\r\n\r\n\r\nb\u00a0c<|endoftext|>"), "a\n\nb c")

    def test_a_licence_is_known_by_its_words_or_refused(self):
        head = "Metadata-Version: 2.1\nName: x\n"
        for said, name in [("License-Expression: MIT", "MIT"), ("License: Apache 2.0 License", "Apache-2.0"),
                           ("Classifier: License :: OSI Approved :: BSD License", "BSD"), ("License: GPL-3.0", None), ("", None)]:
            self.assertEqual(corpus.licence_of(head + said + "\n\nLicense: MIT"), name, said)
        pin = make_wheel(self.work / "wheels", "odd", "1.0", head + "License: GPL-3.0\n\n", {})
        with self.assertRaisesRegex(corpus.Refused, "names no licence"):
            corpus.Wheel(self.work, pin)

    def test_a_wheel_that_changed_is_refused(self):
        name, version, _ = make_wheel(self.work / "wheels", "odd", "1.0", "License: MIT\n\n", {})
        with self.assertRaisesRegex(corpus.Refused, "sha256"):
            corpus.Wheel(self.work, (name, version, "0" * 64))

    def test_code_loses_its_licence_header_and_tables_are_none(self):
        self.assertFalse(corpus.code_of("# Copyright someone\n# Licensed so\n\n" + CODE).startswith("#"))
        self.assertIsNone(corpus.code_of("x = [" + "1, 2, 3, " * 200 + "]"))
        self.assertIn("What this module is for", corpus.prose_of(CODE))
        self.assertEqual(corpus.prose_of("def ("), "")

    def test_questions_are_those_of_the_sets_alone_and_none_of_others_data(self):
        rows = "\n".join(json.dumps(r) for r in [{"input": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2"}], "ideal": ["4"]},
                                                 {"input": "x"}, "odd", {"input": "caf\u00e9", "ideal": "x"}])
        files = {"evals/registry/data/sums/samples.jsonl": rows, "evals/registry/data/other/samples.jsonl": rows}
        pin = make_wheel(self.work / "wheels", "q", "1.0", "License: MIT\n\n", files)
        part = corpus.question_parts(self.work, pin, ["sums"])[0]
        self.assertEqual(part.documents, [[("user", "Add.\n\n2 + 2"), ("assistant", "4")]])
        pin = make_wheel(self.work / "wheels", "q", "1.1", "License: MIT\n\n", {**files, "q-1.1.dist-info/LICENSE": "MIT License. Sums: CC-BY-NC"})
        with self.assertRaisesRegex(corpus.Refused, "sums"):
            corpus.question_parts(self.work, pin, ["sums"])

    def test_tasks_are_summaries_of_papers_that_are_held_out_and_questions_that_have_an_answer(self):
        paper = {"sentences": {"abstract": ["It is new .", "It works ."], "introduction": ["Long ."], "conclusion": ["It worked ."]},
                 "summary": {"outcome": "It worked.", "challenge": "It is hard.", "approach": "They try."}}
        pin = make_wheel(self.work / "wheels", "p", "1.0", "License: MIT\n\n", {"p/test.jsonl": json.dumps(paper), "p/train.jsonl": json.dumps(paper)})
        self.assertEqual(list(tasks.summaries(self.work, pin)),
                         [{"document": "It is new . It works . It worked .", "summary": "It is hard.\nThey try.\nIt worked."}])
        said = "claim: A question: what helps? Zinc.\nclaim: B helps.\nquestion: does zinc help?"
        rows = [{"input": [{"role": "system", "content": "Answer."}, {"role": "user", "content": said}], "ideal": f"Summary: {answer}"} for answer in ("It does.", "N-A")]
        pin = make_wheel(self.work / "wheels", "q", "1.0", "License: MIT\n\n",
                         {"q/registry/data/consensus_summary/samples.jsonl": "\n".join(map(json.dumps, rows)), "q/registry/data/x/samples.jsonl": json.dumps(rows[0])})
        self.assertEqual(list(tasks.questions(self.work, pin)),
                         [{"context": "A question: what helps? Zinc.\nB helps.", "question": "does zinc help?", "answer": "It does."}])

    def test_the_same_packages_give_the_same_bytes_and_a_manifest(self):
        pin = make_wheel(self.work / "wheels", "code", "2.0", "License-Expression: MIT\n\n", {"code/a.py": CODE, "code/tests/b.py": CODE + "\n# more"})
        written = []
        for out in ("one", "two"):
            corpus.Part.seen = set()
            folder = self.work / out
            folder.mkdir()
            written.append([part.written(folder) for part in corpus.python_parts(self.work, [pin])])
        self.assertEqual(written[0], written[1])
        code = written[0][0]
        self.assertEqual((code["part"], code["documents"], code["licences"]), ("python", 1, ["MIT"]))
        self.assertEqual(code["sources"][0]["version"], "2.0")
        self.assertEqual(corpus.sha256((self.work / "one" / code["file"]).read_bytes()), code["sha256"])
        self.assertTrue((self.work / "one" / code["file"]).read_text().endswith(corpus.SEPARATOR))


if __name__ == "__main__":
    unittest.main()
