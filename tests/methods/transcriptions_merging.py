"""As transcriptions.py: the methods that merge what they drop."""

import itertools
import math

import numpy as np

from tests.methods.transcriptions import MARGIN, NearTieError, attention, best, cos, ranking


def visionzip(features, saliency, keys, k, contextual):
    """The rows in raster order, and for each how many tokens it stands for and which slot each token went to."""
    n = len(features)
    dominant = best(saliency, range(n), min(n, k - contextual))
    rest = [i for i in range(n) if i not in dominant]
    step = max(1, len(rest) // contextual) if contextual else 1
    targets = rest[::step][:contextual]
    kept = sorted(dominant + targets)
    members = {t: [] for t in targets}
    for i in rest:
        if i not in targets and targets:
            like = [cos(keys[i], keys[t]) for t in targets]
            (nearest,) = best(like, range(len(targets)), 1)
            members[targets[nearest]].append(i)
    joined = {i: t for t, those in members.items() for i in those}
    mean = {t: np.mean(features[those], axis=0) for t, those in members.items() if those}
    return {
        "indices": kept,
        "dominant": sorted(dominant),
        "contextual": targets,
        "merged": np.array([features[i] + mean.get(i, 0) for i in kept]),
        "sizes": [1 + len(members.get(i, [])) for i in kept],
        "assignment": [kept.index(joined.get(i, i)) if joined.get(i, i) in kept else -1 for i in range(n)],
    }


def raters(visual, text):
    """The text tokens that get more than their share of the visual tokens' softmax, whose logits are not scaled."""
    mass = np.zeros(len(text))
    for v in visual:
        logits = np.array([float(v @ t) for t in text])
        e = np.exp(logits - logits.max())
        mass += e / e.sum() / len(visual)
    if any(0 < abs(m - mass.mean()) < MARGIN * mass.max() for m in mass):
        raise NearTieError
    return [t for t, m in enumerate(mass) if m > mass.mean()] or list(range(len(text)))


def density_peaks(points, k):
    """Centres by falling density times distance to a denser point, and the nearest centre of every point."""
    n, channels = points.shape
    d = np.array([[math.dist(a, b) / math.sqrt(channels) for b in points] for a in points]).reshape(n, n)
    density = [math.exp(-np.mean(sorted(row**2)[:k])) if k else 1.0 for row in d]
    order = ranking(density, range(n))
    for a, b in itertools.pairwise(order):
        if 0 < density[a] - density[b] < MARGIN * density[a]:
            raise NearTieError
    far = {i: min((d[i][j] for j in order[:place]), default=d.max()) for place, i in enumerate(order)}
    centres = best([density[i] * far[i] for i in range(n)], range(n), k)
    nearest = [best([d[i][c] for c in centres], range(len(centres)), 1, largest=False) for i in range(n)]
    return centres, [centres[at[0]] if i not in centres else i for i, at in enumerate(nearest)]


def sparsevlm_shares(n, k, ratio=0.3):
    """Tokens that stay, are recycled, and become of these, by trying: (own, r, c)."""
    k = min(k, n)
    for own in range(k, k - k // 2 - 1, -1):
        r = math.floor(ratio * (n - own) + 1e-9) + 1
        c = r // 10 + 1
        if own + c <= k and own < n:
            return own, r, c
    own = k - k // 2
    return own, math.floor(ratio * (n - own) + 1e-9) + 1, k - own


def sparsevlm(query, key, rows, indices, features, visual, text, k, recycles=True):
    """One stage; the rows in raster order, and for each how many tokens it stands for and where each token went."""
    n, rated_by = len(indices), raters(visual, text)
    s = attention(query, key, rows).mean(0)[rated_by].mean(0)[indices]
    own, r, c = sparsevlm_shares(n, k) if recycles else (min(k, n), 0, 0)
    kept = best(s, range(n), own)
    others = sorted(best(s, [i for i in range(n) if i not in kept], min(r, n - own)))
    peaks, nearest = density_peaks(features[others], c) if c else ([], [])
    centres = [others[i] for i in peaks]
    members = {centre: [] for centre in centres}
    for i, at in zip(others, nearest, strict=False):
        members[others[at]].append(i)
    joined = {i: centre for centre, those in members.items() for i in those}
    slots = sorted(kept + centres)
    return {
        "attention": s,
        "raters": rated_by,
        "indices": slots,
        "centres": sorted(centres),
        "merged": np.array([features[members.get(i, [i])].mean(0) for i in slots]),
        "sizes": [len(members.get(i, [i])) for i in slots],
        "assignment": [slots.index(joined.get(i, i)) if joined.get(i, i) in slots else -1 for i in range(n)],
    }
