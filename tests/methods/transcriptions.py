"""The methods' formulas in plain numpy loops over one unpadded sample, in float64. No code is shared with the package.

A decision that float32 could take differently raises `NearTieError`; the tests then draw other inputs. Exactly equal
values are a tie that the contract settles: the lower index wins.
"""

import itertools
import math
from collections.abc import Iterable

import numpy as np

MARGIN = 1e-4  # relative to the largest value; AdaFV's logits are 100 cos, which costs float32 two digits


class NearTieError(Exception):
    """Two candidates lie closer than rounding in float32."""


def ranking(values, candidates: Iterable[int], largest: bool = True) -> list[int]:
    return sorted(candidates, key=lambda i: (-values[i] if largest else values[i], i))


def best(values, candidates: Iterable[int], count: int, largest: bool = True, margin: float = MARGIN) -> list[int]:
    """The `count` best candidates in order, when the last one in and the first one out are well apart."""
    order = ranking(values, candidates, largest)
    if 0 < count < len(order):
        gap = abs(values[order[count - 1]] - values[order[count]])
        if 0 < gap < margin * max(abs(values[i]) for i in order):
            raise NearTieError
    return order[:count]


def attention(query, key, rows, scale=None):
    """P[h, i, j] of query [Hq, M, D] over key [Hkv, N, D]; the row at position p sees the keys 0 to p."""
    heads, count, dim = query.shape
    scale = dim**-0.5 if scale is None else scale
    p = np.zeros((heads, count, key.shape[1]))
    for h in range(heads):
        for i in range(count):
            seen = rows[i] + 1
            logits = scale * (key[h // (heads // key.shape[0]), :seen] @ query[h, i])
            e = np.exp(logits - logits.max())
            p[h, i, :seen] = e / e.sum()
    return p


def cos(a, b) -> float:
    norms = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / norms if norms else 0.0


def entropy(scores):
    """Of the scores as a distribution, divided by that of as many equal ones."""
    p = scores / scores.sum()
    h = -sum(x * math.log(x) for x in p if x > 0) / math.log(len(p)) if len(p) > 1 else 0.0
    return min(1.0, max(0.0, h))


def coast(query, key, rows, indices, features, k, anchors=0.8, context=(0.05, 0.15), references=0.1, by_rows=False):
    n = len(indices)
    s = attention(query, key, rows).mean(0)[:, indices]
    s_glo, s_last = s.max(0), s[-1]
    h = float(np.mean([entropy(row) for row in s])) if by_rows else entropy(s_glo)

    k_anchor = max(1, math.floor(anchors * k)) if k else 0
    rest = k - k_anchor
    share = rest * (context[0] + (context[1] - context[0]) * h)
    if 1 < share < rest - 1 and abs(share - round(share)) < 1e-4:
        raise NearTieError
    n_low = 0 if rest == 0 else 1 if rest == 1 else min(rest - 1, max(1, math.floor(share)))

    a = best(s_last, range(n), k_anchor)
    r = best(s_glo, range(n), max(1, math.floor(references * n)), largest=False)
    contrast = np.zeros(n)
    for c in range(n):
        to_anchor = max((cos(features[c], features[i]) for i in a), default=0.0)
        contrast[c] = to_anchor - sum(cos(features[c], features[i]) for i in r) / len(r)
    candidates = [c for c in range(n) if c not in a]
    top = best(contrast, candidates, rest - n_low)
    bottom = best(contrast, [c for c in candidates if c not in top], n_low, largest=False)
    return {
        "indices": sorted(a + top + bottom),
        "entropy": h,
        "num_low": n_low,
        "anchors": sorted(a),
        "references": sorted(r),
        "global": s_glo,
        "last": s_last,
        "contrast": contrast,
    }


def row_scores(query, key, rows, indices, how: str):
    """Attention of the visual tokens, mean over heads, then the mean over rows or the last row."""
    s = attention(query, key, rows).mean(0)[:, indices]
    return s.mean(0) if how == "mean" else s[-1]


def repulsion(features, k, phi, start: str, margin: float = MARGIN, aggregate=max, seed=()):
    """Greedy picks of the smallest aggregate of phi(i, j) over the picked j."""
    n, picks = len(features), []
    between = [[phi(i, j) for j in range(n)] for i in range(n)]
    unit = [f / math.sqrt(float(f @ f)) for f in features]
    for _ in range(min(k, n - len(seed))):
        free = [i for i in range(n) if i not in picks and i not in seed]
        taken = [*seed, *picks]
        if taken:
            u = {i: aggregate(between[i][j] for j in taken) for i in free}
        elif start == "outlier":
            total = np.sum(unit, axis=0)
            u = {i: cos(features[i], total) for i in free}
        else:
            u = {i: max((cos(features[i], features[j]) for j in range(n) if j != i), default=0.0) for i in free}
        picks += best(u, free, 1, largest=False, margin=margin)
    return picks


def sts_structure(features, positions, k, exponent=1.0, weights=(1.0, 1.0), epsilon=1e-6):
    box = positions.max(0) - positions.min(0) if positions is not None else 0
    diagonal2 = float(np.sum(box**2)) or 1.0

    def phi(i, j):
        r2 = weights[0] * 2 * (1 - cos(features[i], features[j]))
        if positions is not None:
            r2 += weights[1] * float(np.sum((positions[i] - positions[j]) ** 2)) / diagonal2
        return 1 / (max(r2, 0.0) ** (exponent / 2) + epsilon)

    return repulsion(features, k, phi, "outlier", aggregate=sum)


def max_min(features, k, start="isolated", margin=MARGIN, seed=()):
    return repulsion(features, k, lambda i, j: cos(features[i], features[j]), start, margin, max, seed)


def adafv(text, visual, saliency, k, temperature=100.0, floor=0.25):
    n = len(visual)
    a_t = np.zeros(n)
    for t in text:
        e = np.exp([temperature * (cos(t, v) - 1) for v in visual])
        a_t = np.maximum(a_t, e / e.sum())
    reserved = math.floor(floor * k)
    rest = k - 2 * reserved
    t_order, v_order = ranking(a_t, range(n)), ranking(saliency, range(n))
    mass_t = [sum(a_t[i] for i in t_order[reserved : reserved + r]) for r in range(rest + 1)]
    mass_v = [sum(saliency[i] for i in v_order[reserved : reserved + r]) for r in range(rest + 1)]
    geometric = [math.sqrt(mass_t[r] * mass_v[rest - r]) for r in range(rest + 1)]
    (r_star,) = best(geometric, range(rest + 1), 1)
    by_text = best(a_t, range(n), reserved + r_star)
    by_vision = best(saliency, range(n), reserved + rest - r_star)
    chosen = set(by_text) | set(by_vision)
    share = [max(a_t[i] / a_t.sum(), saliency[i] / sum(saliency)) for i in range(n)]
    fill = best(share, [i for i in range(n) if i not in chosen], k - len(chosen))
    return {"indices": sorted(chosen | set(fill)), "num_text": reserved + r_star, "text": a_t}


def zspaprune(text, visual, k, core_ratio=0.6):
    prompt = np.mean(text, axis=0)
    relevance = [cos(prompt, v) for v in visual]
    core = best(relevance, range(len(visual)), min(k, max(1, math.floor(core_ratio * k))))
    diverse = max_min(visual, k - len(core), seed=core) if k > len(core) else []
    return {"indices": sorted(core + diverse), "core": sorted(core), "diverse": diverse, "relevance": relevance}


def centre_prior(positions, grid):
    axes = [(np.linspace(-size / 2, size / 2, size), size / 2) for size in grid]

    def g(row, column):
        squares = (
            axis[coordinate] ** 2 / (2 * sigma**2)
            for (axis, sigma), coordinate in zip(axes, (row, column), strict=True)
        )
        return math.exp(-sum(squares))

    largest = max(g(r, c) for r in range(grid[0]) for c in range(grid[1]))
    return np.array([g(r, c) / largest for r, c in positions])


def adaptprune(scores, features, positions, k, grid, groups, radius=5.0, sigma_d=1.5, sigma_s=0.05):
    """`scores` is the last row's attention; returns the corrected scores and the picks in order."""
    corrected = scores * centre_prior(positions, grid)
    s, picks = corrected.copy(), []
    for _ in range(min(k, len(s))):
        (m,) = best(s, [j for j in range(len(s)) if j not in picks], 1)
        picks.append(m)
        for j in range(len(s)):
            d = math.dist(positions[j], positions[m])
            if d <= radius and groups[j] == groups[m]:
                alike = (1 - cos(features[j], features[m])) ** 2 / (2 * sigma_s**2)
                s[j] *= 1 - math.exp(-(d**2) / (2 * sigma_d**2)) * math.exp(-alike)
    return {"order": picks, "corrected": corrected}


def evs(features, frames, k):
    """`frames` are the numbers of tokens of each frame, one after the other."""
    start, s = 0, []
    for t, n in enumerate(frames):
        for p in range(n):
            has_one = t > 0 and frames[t - 1] == n
            s.append(1 - cos(features[start + p], features[start - n + p]) if has_one else 255.0)
        start += n
    # The margin is one of cosines, not of the 255.
    return {"dissimilarity": s, "indices": sorted(best(s, range(len(s)), k, margin=MARGIN / 255))}


def dart(key, hidden, text, indices, rows, k, image_pivots=4, text_pivots=4):
    """`key` [Hkv, N, D] of the prompt, `hidden` [V, C] of the tokens at `indices`, `text` [T, C] of those at `rows`."""
    norm = np.abs(key).sum((0, 2))
    of_image = best(norm[indices], range(len(indices)), min(image_pivots, k))
    of_text = best(norm[rows], range(len(rows)), text_pivots)
    best(norm[indices], range(len(indices)), 1), [best(norm[rows], of_text, i) for i in range(len(of_text))]
    [best(norm[indices], of_image, i) for i in range(len(of_image))]  # their order counts too
    kept = set(of_image)
    pivots = [hidden[i] for i in of_image] + [text[i] for i in of_text]
    each = math.ceil((k - len(of_image)) / len(pivots)) if pivots else 0
    for pivot in pivots:
        like = [cos(h, pivot) for h in hidden]
        free = [i for i in range(len(indices)) if i not in kept]
        kept |= set(best(like, free, min(each, k - len(kept)), largest=False))
    return {"indices": sorted(kept), "of_image": of_image, "of_text": of_text}


def cdpruner(features, text, k, image=None, margin=MARGIN):
    """The gain of a token is a quotient of determinants, so that no factor is updated; k is below the rank."""
    patches, sign = (features, 1) if image is None else (image, -1)
    relevance = np.array([sign * sum(cos(e, t) for t in text) / len(text) for e in patches])
    low, high = relevance.min(), relevance.max()
    quality = (relevance - low + 1e-6) / (high - low) if high > low else np.ones(len(relevance))
    likeness = np.array([[cos(f, g) for g in features] for f in features])
    kernel, picks, gains = quality[:, None] * likeness * quality, [], []
    for _ in range(min(k, len(features))):
        rest = [i for i in range(len(features)) if i not in picks]
        whole = np.linalg.det(kernel[np.ix_(picks, picks)])
        gain = {i: np.linalg.det(kernel[np.ix_([*picks, i], [*picks, i])]) / whole for i in rest}
        (j,) = best(gain, rest, 1, margin=margin)
        picks.append(j)
        gains.append(gain[j])
    return {"order": picks, "relevance": relevance, "quality": quality, "gains": gains}


def scope(features, saliency, k, alpha=1.0):
    n = len(features)
    likeness = [[cos(f, g) for g in features] for f in features]
    covered, picks, gains = [0.0] * n, [], []
    for _ in range(min(k, n)):
        rest = [i for i in range(n) if i not in picks]
        gain = {i: sum(max(likeness[r][i] - covered[r], 0) for r in range(n)) * saliency[i] ** alpha for i in rest}
        (j,) = best(gain, rest, 1)
        picks.append(j)
        gains.append(gain[j])
        covered = [max(c, likeness[r][j]) for r, c in enumerate(covered)]
    return {"order": picks, "gains": gains}


def vidcom2(features, frames, k, rate=None):
    """`frames` are the numbers of tokens of each frame, one after the other; `rate` is K / V if not given."""
    rate = k / len(features) if rate is None else rate
    n, channels = features.shape
    variance = [float(np.mean((column - column.mean()) ** 2)) for column in features.T]
    narrow = sorted(best(variance, range(channels), max(1, channels // 2), largest=False))
    u = np.array([row / max(math.sqrt(float(row @ row)), 1e-12) for row in features[:, narrow]])
    of = [t for t, size in enumerate(frames) for _ in range(size)]
    centre = [u[[i for i in range(n) if of[i] == t]].mean(0) for t in range(len(frames))]

    def likeness(a, c):
        return sum(math.exp(-float((a - c) @ (a - c)) / (2 * width)) for width in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    of_video = [likeness(row, u.mean(0)) for row in u]
    s = [a + likeness(row, centre[t]) for a, row, t in zip(of_video, u, of, strict=True)]
    z = [-float(np.mean([of_video[i] for i in range(n) if of[i] == t])) for t in range(len(frames))]
    w = np.exp((np.array(z) - max(z)) / 0.01)
    w /= w.sum()
    budgets = []
    for t, size in enumerate(frames):
        due = min(1.0, rate * (1 + w[t] - 1 / len(frames))) * size
        if abs(due % 1 - 0.5) < 1e-3:
            raise NearTieError
        budgets.append(min(size, max(1, round(due))))
    kept = []
    for t, budget in enumerate(budgets):
        kept += best(s, [i for i in range(n) if of[i] == t], budget, largest=False)
    if len(kept) > k:
        kept = best(s, kept, k, largest=False)
    else:
        kept = kept + best(s, [i for i in range(n) if i not in kept], min(k, n) - len(kept), largest=False)
    return {"indices": sorted(kept), "redundancy": s, "budgets": budgets}


def mmtok(features, text, k, seen=None, alpha=0.5):
    """Coverage of the stacked matrix, with the weights multiplied in, as in the authors' code."""
    seen, n, rows = features if seen is None else seen, len(features), []
    for queries, tokens, temperature, weight in ((text, features, 0.02, 1.0), (seen, seen, 0.2, alpha)):
        for query in queries:
            e = np.exp([(cos(query, token) - 1) / temperature for token in tokens])
            rows.append(weight / len(queries) * e / e.sum())
    covered, picks, gains = [0.0] * len(rows), [], []
    for _ in range(min(k, n)):
        rest = [i for i in range(n) if i not in picks]
        gain = {i: sum(max(row[i] - c, 0) for row, c in zip(rows, covered, strict=True)) for i in rest}
        (j,) = best(gain, rest, 1)
        picks.append(j)
        gains.append(gain[j])
        covered = [max(c, row[j]) for row, c in zip(rows, covered, strict=True)]
    return {"order": picks, "gains": gains}


def idpruner(features, importance, k, weight=0.5):
    n = len(features)
    w = (importance - importance.min()) / (importance.max() - importance.min() + 1e-6) if n else importance
    like = [[cos(f, g) for g in features] for f in features]
    picks = []
    for _ in range(min(k, n)):
        rest = [i for i in range(n) if i not in picks]
        worth = {i: weight * w[i] - (1 - weight) * max(like[i][j] for j in picks) if picks else w[i] for i in rest}
        picks += best(worth, rest, 1)
    return {"order": picks, "importance": w}


def vispruner(features, saliency, k, ratio=0.5, margin=MARGIN):
    """The list as the authors' code keeps it; of an odd length, the first half has an entry more."""
    important = best(saliency, range(len(features)), math.floor(ratio * k))
    listed = ranking(saliency, [i for i in range(len(features)) if i not in important])
    target = k - math.floor(ratio * k)
    while len(listed) > target:
        first, second = listed[::2], listed[1::2]
        like = {i: max((cos(features[i], features[j]) for j in second), default=0.0) for i in first}
        order = sorted(first, key=lambda i: -like[i])  # equal ones stay in the order of the list
        for i, j in itertools.pairwise(order):
            if 0 < like[i] - like[j] < margin:
                raise NearTieError
        listed = order[min(8, len(listed) - target) :] + second
    return {"important": sorted(important), "diverse": sorted(listed)}
