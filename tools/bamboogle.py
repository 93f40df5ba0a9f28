"""What the Bamboogle column of SDAR's Table 1 is made of, and the averages without it: python -m tools.bamboogle

Bamboogle has 125 questions, so an accuracy is k/125. The released evaluation averages, per data set, the means of
batches of 512 questions. 51,713 questions are 101 batches and one more: if Bamboogle comes last, its last question is a
batch of its own, and the number printed is (k/124 + b)/2, with k of 124 right and b = 1 or 0 for that question. Pooled,
the same answers are (k + b)/125. Numbers: arXiv 2605.15155 v1, Table 1, Search-QA; * is evaluated with skills in the
prompt. Consequences: docs/evidence.md.
"""

from statistics import mean

TABLE = """
# Qwen2.5-3B
Vanilla       24.6  48.1  31.0  26.3  25.3   7.2  59.7
Skill-Prompt* 23.7  46.2  30.6  24.4  22.1   7.5  12.5
OPSD           0.1   0.1   0.1   0.0   0.0   0.0   0.0
GRPO          39.3  60.6  41.1  37.4  34.6  15.4  26.4
Skill-GRPO    43.5  58.8  43.0  36.8  32.2  11.7  12.5
Skill-GRPO*   44.3  59.6  44.3  39.0  36.1  14.5  14.9
GRPO+OPSD     44.9  61.2  45.2  40.4  38.5  16.0  66.1
Skill-SD      44.4  60.4  44.0  39.5  40.4  15.4  64.9
RLSD          41.5  58.6  42.3  40.4  40.2  16.8  66.9
SDAR          44.8  58.1  44.3  38.6  36.2  15.7  66.1
# Qwen2.5-7B
Vanilla       25.2  50.8  29.5  29.0  29.0  10.4  63.7
Skill-Prompt* 30.9  52.1  32.7  32.7  27.9  12.7  66.1
OPSD           8.8   8.6  17.5   2.5   4.2   0.5   1.2
GRPO          45.1  63.7  44.0  43.6  43.2  16.8  37.6
Skill-GRPO    45.2  63.7  45.7  43.1  43.3  19.6  21.4
Skill-GRPO*   44.8  63.0  45.1  43.7  43.7  20.5  71.4
GRPO+OPSD     47.3  64.5  46.9  43.8  39.3  18.0  69.4
Skill-SD      47.1  64.5  47.8  44.2  42.1  20.2  69.0
RLSD          46.8  63.0  44.4  45.5  48.9  21.5  73.0
SDAR          46.3  63.5  48.2  43.8  48.4  19.6  73.0
# Qwen3-1.7B
Vanilla       29.4  46.9  37.0  23.5  19.6   6.4  10.5
Skill-Prompt* 29.4  46.5  36.2  22.9  20.8   4.3  10.1
OPSD           4.2   8.3   4.6   6.6  15.3   0.7   1.2
GRPO          40.0  58.9  43.5  35.4  30.3  12.0  65.7
Skill-GRPO    39.2  58.6  43.9  35.2  28.2  11.5  66.1
Skill-GRPO*   38.0  58.4  43.9  36.3  29.0  12.5  66.9
GRPO+OPSD     40.7  58.9  45.0  37.0  34.6  13.3  65.7
Skill-SD      39.1  57.5  45.4  34.8  34.1  10.7  64.1
RLSD          38.6  57.3  43.0  34.5  34.1  11.5  65.3
SDAR          39.7  58.9  45.3  35.9  35.5  12.6  65.3
"""  # percent: NQ, TriviaQA, PopQA, HotpotQA, 2Wiki, MuSiQue, Bamboogle


def read_table(text=TABLE):
    """-> {model: {method: [seven accuracies in percent]}}."""
    table = {}
    for line in text.strip().splitlines():
        name, *values = line.split()
        if name == "#":
            rows = table[values[0]] = {}
        else:
            rows[name] = [float(value) for value in values]
    return table


def right_answers(printed, digits=1):
    """A printed percentage -> (k, b) with (k/124 + b)/2 = printed to its digits, or None if there are none."""
    for b in (0, 1):
        k = round((printed / 50 - b) * 124)
        if 0 <= k <= 124 and abs(50 * (k / 124 + b) - printed) <= 0.5001 * 10 ** -digits:
            return k, b
    return None


def pooled(printed):
    """The accuracy over all 125 questions, in percent; a number that does not have the form is kept."""
    return 100 * sum(found) / 125 if (found := right_answers(printed)) else printed


def main():
    table = read_table()
    fits = [right_answers(row[-1]) is not None for rows in table.values() for row in rows.values()]
    chance = mean(right_answers(i / 10) is not None for i in range(1001))
    print(f"{sum(fits)} of {len(fits)} printed values are (k/124 + b)/2; of all one-decimal numbers {chance:.0%} are")
    for model, rows in table.items():
        averages = {name: mean([*row[:-1], pooled(row[-1])]) for name, row in rows.items()}
        print(f"\n{model:13} Bamboogle  k b  pooled   average  pooled  minus GRPO's")
        for name, row in rows.items():
            k, b = right_answers(row[-1]) or ("-", "-")
            print(f"{name:13} {row[-1]:9.1f} {k:>2} {b} {pooled(row[-1]):7.1f} {mean(row):9.1f} {averages[name]:7.1f} "
                  f"{averages[name] - averages['GRPO']:+13.1f}")


if __name__ == "__main__":
    main()
