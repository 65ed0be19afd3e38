#!/usr/bin/env python3
"""Composes questions over six tasks out of the default corpus, for the target to answer itself.

    prompts.py CORPUS OUT [--count N] [--seed S]

CORPUS is what `corpus.py` made. OUT gets JSON lines {"id", "task", "messages"}, one user turn each, in a shuffled order, so that
any head of the file holds every task. Passages, functions and questions are the corpus' own; the words around them, subjects and
sums are written here. The same corpus, count and seed give the same bytes. No evaluation prompt is read; what trains on the
answers leaves out documents that hold one (`keep_out`).
"""
import argparse
import ast
import json
import pathlib
import random
import re
import textwrap

SEPARATOR = "<|endoftext|>"

SUBJECTS = """a bicycle|a lighthouse|the water cycle|photosynthesis|a small bakery|the printing press|volcanoes|a public library|black holes|beekeeping|
the French Revolution|a vegetable garden|electric cars|a night train|the human heart|chess|coral reefs|an old piano|glaciers|a school play|vaccines|
the Silk Road|a mountain hut|compound interest|migrating birds|a broken radio|the Roman Empire|tides|a stray cat|solar panels|the immune system|a chess club|
earthquakes|a fishing village|sleep|plate tectonics|a robot gardener|the moon landing|probability|a lost letter|antibiotics|hurricanes|a travelling circus|
the periodic table|inflation|a lonely giant|recycling|the stock market|dinosaurs|a clockmaker|ocean currents|a desert caravan|machine learning|
the Industrial Revolution|a haunted theatre|rainbows|nutrition|a village fair|the speed of light|bridges|a rainy Sunday|volunteering|time zones|a secret recipe|
the Great Wall of China|friendship|a ferry captain|renewable energy|the solar system|public speaking|a first day at work|wolves|wind turbines|jazz|
a community garden|the Renaissance|meditation|a treasure map|bacteria|democracy|a talking river|running a marathon|databases|the carbon cycle|a snowstorm|
museums|gravity|an orchestra|learning a language|the Olympic Games|a spice market|climate change|a space station|weather forecasts|good manners""".replace("\n", "").split("|")

PEOPLE = "a ten-year-old|a new colleague|my grandmother|a class of teenagers|a busy manager|someone new to the subject|a patient|a tourist|a friend|an evening class".split("|")

CHAT = [
    "Explain {a} to {p}.",
    "Write a short story about {a} and {b}.",
    "Give me five tips about {a}.",
    "What should I know about {a} before I start? Keep it practical.",
    "Write a polite email to {p} about {a}.",
    "Can you help me plan a talk about {a}? An outline with three parts would be enough.",
    "Compare {a} with {b}. What do they have in common, and where do they differ?",
    "Write a poem about {a}.",
    "I want to write a blog post about {a}. Suggest a title and an opening paragraph.",
    "Let's play a role: you are an expert on {a}, and I am {p}. Introduce yourself.",
    "List the advantages and disadvantages of {a}.",
    "Write a dialogue between two people who disagree about {a}.",
    "hi! my daughter has to write something about {a} for school. what are the most important points?",
    "How would you describe {a} in one paragraph, and then in one sentence?",
]

FACTS = [
    "What is {a}?",
    "Why does {a} matter?",
    "Give a short answer: what are the main ideas behind {a}?",
    "What are common misunderstandings about {a}?",
    "Describe the history of {a} in a few sentences.",
    "How does {a} work? Explain it step by step.",
    "Name three facts about {a} and say why each is interesting.",
]

SUMMARIES = [
    "Summarise the following text in two sentences.\n\n{t}",
    "Summarize this for me:\n\n{t}",
    "{t}\n\nWhat is the main point of this passage?",
    "Write a short summary of the text below, in plain words.\n\n{t}",
    "Give three bullet points that cover the following passage.\n\n{t}",
    "Write a title and a one-sentence abstract for this:\n\n{t}",
]

ON_TEXT = [
    "Read the passage and answer the question.\n\n{t}\n\nQuestion: what problem does it describe, and what is done about it?",
    "Context:\n{t}\n\nAnswer from the context alone: what is said about {k}?",
    "{t}\n\nBased on this text, explain {k}.",
]

EXTRACTIONS = [
    "List the key terms of the following text.\n\n{t}",
    "Rewrite this passage so that it is more formal, and return the whole text.\n\n{t}",
    "Correct any mistakes in this text and return it in full:\n\n{t}",
    "Rewrite the following as a numbered list, one statement a line.\n\n{t}",
    "Copy every sentence of this text that mentions {k}.\n\n{t}",
    "Turn this into JSON with the keys \"subject\", \"method\" and \"result\".\n\n{t}",
    "Translate into {l}: {s}",
]

CODE = [
    "Explain what this {n} code does.\n\n```{m}\n{c}\n```",
    "Add comments to this {n} function and return it in full.\n\n```{m}\n{c}\n```",
    "Write tests for this {n} code.\n\n```{m}\n{c}\n```",
    "Rename the variables of this {n} code so that it reads better. Return the complete code.\n\n```{m}\n{c}\n```",
]

WRITE = [
    "Write a Python function `{f}` for this: {d}",
    "Write a Python function that does the following, with type hints. {d}",
    "How would you write this in Python? {d} Show the code and explain it.",
]

NAMES = "Maya Tom Aisha Lars Chen Rosa Femi Ingrid Ravi Clara Omar Nadia Piotr Elena Hugo Amara".split()
THINGS = "apples pencils stamps marbles tickets bottles cards bricks oranges books".split()


def documents(path):
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [d.strip() for d in text.split(SEPARATOR) if d.strip()]


def passages(texts):
    """Paragraphs of prose, long enough to have a point and short enough to leave room for an answer."""
    found = []
    for text in texts:
        for part in re.split(r"\n\s*\n", text):
            part = " ".join(part.split())
            letters = sum(c.isalpha() or c == " " for c in part)
            if 250 <= len(part) <= 1100 and letters > 0.9 * len(part) and part[0].isupper() and part[-1] in ".!?":
                found.append(part)
    return found


def functions(texts):
    """Python functions with the first sentence of their documentation: (name, sentence, code), code without the documentation."""
    found = []
    for text in texts:
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            code = textwrap.dedent("\n".join(lines[node.lineno - 1:node.end_lineno]))
            note = ast.get_docstring(node) or ""
            sentence = " ".join(note.split("\n\n")[0].split())
            if 80 <= len(code) <= 900:
                found.append((node.name, sentence if 25 <= len(sentence) <= 240 else "", code))
    return found


def rust(texts):
    """Rust functions that end where their indentation does."""
    found = []
    for text in texts:
        for match in re.finditer(r"^(?:pub )?fn \w+.{60,880}?^}", text, re.M | re.S):
            found.append(match[0])
    return found


def sums(draw):
    """A question about amounts, with numbers of its own."""
    n, m = draw.sample(NAMES, 2)
    thing = draw.choice(THINGS)
    a, b, c, d = draw.randint(12, 96), draw.randint(2, 9), draw.randint(3, 40), draw.choice([5, 10, 15, 20, 25, 40])
    return draw.choice([
        f"{n} has {a} {thing}. {m} has {b} times as many. How many do they have together?",
        f"A box holds {b} {thing}. {n} fills {c} boxes and has {draw.randint(1, b - 1)} left over. How many {thing} did {n} start with?",
        f"The price of a coat is {a} euros. It falls by {d}% and then rises by {draw.choice([5, 10, 20])}%. What does it cost now?",
        f"{n} walks {b} km at {draw.randint(3, 6)} km/h and cycles {c} km at {draw.randint(12, 20)} km/h. How long does it take in all? Explain each step.",
        f"Solve for x: {b}x + {c} = {a + c}.",
        f"Solve the equation x^2 - {b + d // 5}x + {b * d // 5} = 0 and check your answer.",
        f"What is {a} * {c} - {b}? Show how you work it out.",
        f"A rectangle is {a} cm long and {c} cm wide. Find its area, its perimeter and the length of its diagonal.",
        f"A bag holds {b} red, {c} blue and {draw.randint(2, 12)} green {thing}. One is drawn at random. What is the probability that it is blue? And that it is not red?",
        f"{n} saves {c} euros a week and {m} saves {b} euros a week more. After how many weeks have they saved {a * 10} euros together?",
        f"Simplify ({b}x + {c})({b + 1}x - {draw.randint(1, 9)}).",
        f"Find the derivative of f(x) = {b}x^3 - {c}x^2 + {a}x and the points where it is zero.",
        f"The mean of {b} numbers is {c}. A further number, {a}, is added. What is the new mean?",
        f"Write {a * c} as a product of primes.",
        f"A train leaves at {draw.randint(6, 11)}:{draw.randint(10, 50)} and travels {a * 3} km at {draw.choice([60, 80, 90, 120])} km/h. When does it arrive?",
        f"{n}, {m} and a friend share {a * 3} {thing} in the ratio {b}:{b + 1}:{b + 2}. How many does each of them get, and what is left?",
    ])


def clean(text):
    return text.encode("utf-8", "ignore").decode()


def compose(corpus, count, seed):
    """`count` questions, the tasks in equal parts: {"id", "task", "messages"}."""
    draw = random.Random(seed)
    prose = passages(documents(corpus / "papers.txt") + documents(corpus / "documentation.txt"))
    python = functions(documents(corpus / "python.txt"))
    told = [(f, d) for f, d, _ in python if d]
    systems = rust(documents(corpus / "rust.txt"))
    path = corpus / "questions.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    asked = [json.loads(line)["messages"][0]["content"] for line in lines if line]
    for name, part in [("prose", prose), ("Python functions", told), ("Rust functions", systems), ("questions", asked)]:
        if not part:
            raise SystemExit(f"{corpus} holds no {name}: is it what `cargo xtask data` made?")

    def subject(template):
        a, b = draw.sample(SUBJECTS, 2)
        return template.format(a=a, b=b, p=draw.choice(PEOPLE))

    def passage(template):
        text = draw.choice(prose)
        words = [w.strip(".,;:()") for w in text.split() if len(w) > 6 and w.strip(".,;:()").isalpha()] or ["this"]
        first = re.split(r"(?<=[.!?]) ", text)[0]
        return template.format(t=text, k=draw.choice(words), s=first, l=draw.choice(["French", "German", "Spanish", "English"]))

    def code():
        kind = draw.random()
        if kind < 0.4:
            f, d = draw.choice(told)
            return draw.choice(WRITE).format(f=f, d=d)
        if kind < 0.75:
            return draw.choice(CODE).format(n="Python", m="python", c=draw.choice(python)[2])
        return draw.choice(CODE).format(n="Rust", m="rust", c=draw.choice(systems))

    def question():
        kind = draw.random()
        if kind < 0.4:
            return subject(draw.choice(FACTS))
        if kind < 0.7:
            return passage(draw.choice(ON_TEXT))
        return draw.choice(asked)

    tasks = {
        "chat": lambda: subject(draw.choice(CHAT)),
        "code": code,
        "maths": lambda: sums(draw),
        "summarisation": lambda: passage(draw.choice(SUMMARIES)),
        "question answering": question,
        "extraction": lambda: passage(draw.choice(EXTRACTIONS)),
    }
    seen, made = set(), []
    names, idle = list(tasks), 0
    while len(made) < count:
        task = names[len(made) % len(names)]
        text = clean(tasks[task]())
        if text in seen:
            idle += 1
            if idle > 10_000:
                raise SystemExit(f"{count} different questions were wanted; the corpus gives {len(made)} for {task}")
            continue
        idle = 0
        seen.add(text)
        made.append({"id": f"composed-{seed}-{len(made)}", "task": task, "messages": [{"role": "user", "content": text}]})
    return made


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("corpus", type=pathlib.Path)
    args.add_argument("out", type=pathlib.Path)
    args.add_argument("--count", type=int, default=20_000)
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    made = compose(args.corpus, args.count, args.seed)
    with args.out.open("w", encoding="utf-8", newline="\n") as out:
        for line in made:
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    counts = {}
    for line in made:
        counts[line["task"]] = counts.get(line["task"], 0) + 1
    print(json.dumps({"prompts": len(made), "tasks": counts, "seed": args.seed}))


if __name__ == "__main__":
    main()
