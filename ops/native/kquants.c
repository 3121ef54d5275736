/* Fits of K-quant blocks: ops/blocks/search.py, refine.py and kquant_search.py, to the bit.
 *
 * LANES blocks run side by side in a vector, so that sums keep the order of the formulas in torch.
 * Nothing is allocated and nothing is global: threads call it at will.
 */
#include "vectors.h"

#define BLOCK 256
#define MOST_GROUPS 16

typedef struct {
    int32_t group;      /* weights that share a scale */
    int32_t affine;     /* codes from zero with a minimum; else signed scales */
    int32_t code_least, code_most;
    int32_t scale_least, scale_most;
    int32_t widths, moves;
    float width[32];    /* tried one after another */
    int32_t step[16], shift[16];
    float gaussian_loss; /* zero: nothing is asked about luck */
} Form;

typedef struct {
    V d, dmin, scale[MOST_GROUPS], minimum[MOST_GROUPS];
} Fit;

static const float MORE = 1 + 1e-6;

/* search.fit_affine of one group; w: importance or NULL */
static void fit_affine(const V *x, const V *w, const Form *form, V *scale, V *offset) {
    const V zero = all(0), top = all(form->code_most);
    V high = x[0], low = x[0], sum_x = w ? w[0] * x[0] : x[0], sum_w = w ? w[0] : all(form->group);
    for (int i = 1; i < form->group; i++) {
        high = pick(x[i] > high, x[i], high);
        low = pick(x[i] < low, x[i], low);
        sum_x += w ? w[i] * x[i] : x[i];
        if (w) sum_w += w[i];
    }
    low = below(low, zero);
    V gain = all(-INFINITY), base = low;
    *scale = (high - low) / top;
    for (int t = 0; t < form->widths; t++) {
        V inverse = all(form->width[t]) / (high - base);
        V sum_l = zero, sum_l2 = zero, sum_xl = zero;
        for (int i = 0; i < form->group; i++) {
            V code = to_code((x[i] - base) * inverse, zero, top);
            V weighted = w ? w[i] * code : code, product = (w ? w[i] * x[i] : x[i]) * code;
            sum_l = i ? sum_l + weighted : weighted;
            sum_l2 = i ? sum_l2 + weighted * code : weighted * code;
            sum_xl = i ? sum_xl + product : product;
        }
        V determinant = sum_w * sum_l2 - sum_l * sum_l;
        V trial = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        V trial_base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        trial = pick(trial_base > zero, sum_xl / sum_l2, trial);
        trial_base = below(trial_base, zero);
        V trial_gain = trial * sum_xl + trial_base * sum_x;
        M better = (trial_gain > gain * MORE) & (determinant > sum_w * sum_l2 * 1e-5f);
        gain = pick(better, trial_gain, gain);
        *scale = pick(better, trial, *scale);
        base = pick(better, trial_base, base);
    }
    *offset = -base;
}

/* The entry of largest magnitude, the first one where two tie; base.signed_peak */
static V signed_peak(const V *x, int count) {
    V peak = x[0];
    for (int i = 1; i < count; i++) {
        V magnitude = pick(peak < all(0), -peak, peak), other = pick(x[i] < all(0), -x[i], x[i]);
        peak = pick(other > magnitude, x[i], peak);
    }
    return peak;
}

/* search.fit_symmetric of one group */
static V fit_symmetric(const V *x, const V *w, const Form *form) {
    const V zero = all(0), least = all(form->code_least), most = all(form->code_most);
    V peak = signed_peak(x, form->group), gain = zero, scale = zero;
    for (int t = 0; t < form->widths; t++) {
        V inverse = all(-form->width[t]) / peak, sum_xl = zero, sum_l2 = zero;
        for (int i = 0; i < form->group; i++) {
            V code = to_code(x[i] * inverse, least, most), square = code * code;
            V product = (w ? w[i] * x[i] : x[i]) * code;
            if (w) square *= w[i];
            sum_xl = i ? sum_xl + product : product;
            sum_l2 = i ? sum_l2 + square : square;
        }
        V trial = sum_xl / sum_l2, trial_gain = trial * sum_xl;
        M better = trial_gain > gain * MORE;
        gain = pick(better, trial_gain, gain);
        scale = pick(better, trial, scale);
    }
    return scale;
}

static V inverse_of(V step) { return pick(step != all(0), all(1) / step, all(0)); }

/* refine.best_codes of one group */
static void best_codes(const V *x, const Fit *fit, int g, const Form *form, V *code) {
    const V least = all(form->code_least), most = all(form->code_most);
    V inverse = inverse_of(fit->d * fit->scale[g]), shift = fit->dmin * fit->minimum[g];
    for (int i = 0; i < form->group; i++) {
        V value = form->affine ? x[i] + shift : x[i];
        code[i] = to_code(value * inverse, least, most);
    }
}

/* refine.group_errors of one group */
static V group_error(const V *x, const V *w, const Fit *fit, int g, const Form *form, const V *code) {
    V step = fit->d * fit->scale[g], shift = fit->dmin * fit->minimum[g], total = all(0);
    for (int i = 0; i < form->group; i++) {
        V residual = code[i] * step;
        if (form->affine) residual -= shift;
        residual -= x[i];
        residual *= residual;
        if (w) residual *= w[i];
        total = i ? total + residual : residual;
    }
    return total;
}

static V least_error(const V *x, const V *w, const Fit *fit, int g, const Form *form) {
    V code[32];
    best_codes(x, fit, g, form, code);
    return group_error(x, w, fit, g, form, code);
}

typedef struct {
    V dd, dx, mm, dm, mx;
} Products;

/* refine._products, of the best codes */
static Products products_of(const V *x, const V *w, const Fit *fit, const Form *form) {
    const int size = form->group, groups = BLOCK / size;
    Products all_of = {0};
    for (int g = 0; g < groups; g++) {
        const V *xs = x + g * size, *ws = w ? w + g * size : 0;
        V code[32], dd = all(0), dx = dd, steps = dd, sum_w = all(size), sum_x = dd;
        best_codes(xs, fit, g, form, code);
        for (int i = 0; i < size; i++) {
            V step = code[i] * fit->scale[g], weighted = ws ? ws[i] * step : step;
            V own = ws ? ws[i] * xs[i] : xs[i];
            dx = i ? dx + weighted * xs[i] : weighted * xs[i];
            dd = i ? dd + step * weighted : step * weighted;
            steps = i ? steps + weighted : weighted;
            sum_x = i ? sum_x + own : own;
            if (ws) sum_w = i ? sum_w + ws[i] : ws[i];
        }
        all_of.dd = g ? all_of.dd + dd : dd;
        all_of.dx = g ? all_of.dx + dx : dx;
        if (form->affine) {
            V shift = -fit->minimum[g];
            all_of.mm = g ? all_of.mm + shift * shift * sum_w : shift * shift * sum_w;
            all_of.dm = g ? all_of.dm + steps * shift : steps * shift;
            all_of.mx = g ? all_of.mx + sum_x * shift : sum_x * shift;
        }
    }
    return all_of;
}

/* refine._solve */
static void solve(const Fit *fit, const Products *p, const Form *form, V *d, V *dmin) {
    *dmin = fit->dmin;
    if (!form->affine) {
        *d = as_stored(p->dx / p->dd);
        return;
    }
    V determinant = p->dd * p->mm - p->dm * p->dm;
    M both = determinant > p->dd * 1e-6f * p->mm;
    *d = pick(both, (p->dx * p->mm - p->mx * p->dm) / determinant, p->dx / p->dd);
    *dmin = pick(both, (p->dd * p->mx - p->dm * p->dx) / determinant, fit->dmin);
    *d = as_stored(pick(both | (p->mm == all(0)), *d, fit->d));
    *dmin = as_stored(*dmin);
}

static V gain_of(V d, V dmin, const Products *p, const Form *form) {
    V gain = d * (2 * p->dx - d * p->dd);
    if (!form->affine) return gain;
    return gain + dmin * (2 * (p->mx - d * p->dm) - dmin * p->mm);
}

static void settle(const V *x, const V *w, Fit *fit, const Form *form) {
    Products p = products_of(x, w, fit, form);
    V d, dmin;
    solve(fit, &p, form, &d, &dmin);
    M better = gain_of(d, dmin, &p, form) > gain_of(fit->d, fit->dmin, &p, form);
    fit->d = pick(better, d, fit->d);
    fit->dmin = pick(better, dmin, fit->dmin);
}

/* refine._move of one group */
static V move(const V *x, const V *w, Fit *fit, int g, const Form *form, V error) {
    const V scale = fit->scale[g], minimum = fit->minimum[g];
    const V least = all(form->scale_least), most = all(form->scale_most);
    V kept_scale = scale, kept_minimum = minimum;
    for (int t = 0; t < form->moves; t++) {
        V trial_scale = below(above(scale + (float)form->step[t], least), most);
        V trial_minimum = minimum;
        if (form->affine) trial_minimum = below(above(minimum + (float)form->shift[t], least), most);
        fit->scale[g] = trial_scale;
        fit->minimum[g] = trial_minimum;
        V trial = least_error(x, w, fit, g, form);
        M better = trial < error;
        error = pick(better, trial, error);
        kept_scale = pick(better, trial_scale, kept_scale);
        kept_minimum = pick(better, trial_minimum, kept_minimum);
    }
    fit->scale[g] = kept_scale;
    fit->minimum[g] = kept_minimum;
    return error;
}

#define ROUNDS 2

static void refine(const V *x, const V *w, Fit *fit, const Form *form) {
    const int size = form->group, groups = BLOCK / size;
    V error[MOST_GROUPS], trial_error[MOST_GROUPS];
    for (int g = 0; g < groups; g++)
        error[g] = least_error(x + g * size, w ? w + g * size : 0, fit, g, form);
    for (int round = 0; round < ROUNDS; round++) {
        for (int g = 0; g < groups; g++)
            error[g] = move(x + g * size, w ? w + g * size : 0, fit, g, form, error[g]);
        Products p = products_of(x, w, fit, form);
        Fit trial = *fit;
        solve(fit, &p, form, &trial.d, &trial.dmin);
        V before = all(0), after = all(0);
        for (int g = 0; g < groups; g++) {
            trial_error[g] = least_error(x + g * size, w ? w + g * size : 0, &trial, g, form);
            before = g ? before + error[g] : error[g];
            after = g ? after + trial_error[g] : trial_error[g];
        }
        M better = after < before;
        fit->d = pick(better, trial.d, fit->d);
        fit->dmin = pick(better, trial.dmin, fit->dmin);
        for (int g = 0; g < groups; g++) error[g] = pick(better, trial_error[g], error[g]);
    }
}

/* kquant_search.in_steps */
static V in_steps(V values, V step, const Form *form) {
    V found = pick(step != all(0), values / step, all(0));
    return to_code(found, all(form->scale_least), all(form->scale_most));
}

/* d of the largest of [groups] scales or offsets, all at or above zero */
static V step_to_top(const V *values, int groups, float most) {
    V high = values[0];
    for (int g = 1; g < groups; g++) high = pick(values[g] > high, values[g], high);
    return as_stored(pick(high > all(0), high, all(0)) / all(most));
}

/* d of the scale of largest magnitude, which takes the lower end; base.half_above */
static V step_to_peak(const V *scale, int groups, float least) {
    V peak = signed_peak(scale, groups), inverse = all(least) / peak, d;
    for (int l = 0; l < LANES; l++) {
        float magnitude = fabsf(peak[l]), step = magnitude < 1e-15f ? 0.0f : 1 / inverse[l];
        uint16_t half = to_half(step);
        d[l] = of_half(fabsf(of_half(half)) < fabsf(step) ? half + 1 : half);
    }
    return d;
}

static void fit_block(const V *x, const V *w, const Form *form, Fit *fit) {
    const int size = form->group, groups = BLOCK / size;
    V scale[MOST_GROUPS], offset[MOST_GROUPS];
    for (int g = 0; g < groups; g++) {
        const V *xs = x + g * size, *ws = w ? w + g * size : 0;
        if (form->affine) fit_affine(xs, ws, form, &scale[g], &offset[g]);
        else scale[g] = fit_symmetric(xs, ws, form);
    }
    memset(fit, 0, sizeof *fit);
    if (form->affine) {
        fit->d = step_to_top(scale, groups, form->scale_most);
        fit->dmin = step_to_top(offset, groups, form->scale_most);
        for (int g = 0; g < groups; g++) fit->minimum[g] = in_steps(offset[g], fit->dmin, form);
    } else {
        fit->d = step_to_peak(scale, groups, form->scale_least);
    }
    for (int g = 0; g < groups; g++) fit->scale[g] = in_steps(scale[g], fit->d, form);
    if (form->moves) refine(x, w, fit, form);
    else settle(x, w, fit, form);
}

/* ggml.worth_trying: whether a block is like no gaussian one */
static M worth_trying(const V *x, V lost, const Form *form) {
    const int size = form->group;
    V energy = all(0), fourth = energy;
    for (int g = 0; g < BLOCK / size; g++) {
        V own = all(0), own_fourth = own;
        for (int i = 0; i < size; i++) {
            V square = x[g * size + i] * x[g * size + i];
            own = i ? own + square : square;
            own_fourth = i ? own_fourth + square * square : square * square;
        }
        energy = g ? energy + own : own;
        fourth = g ? fourth + own_fourth : own_fourth;
    }
    V loss = lost / all(form->gaussian_loss);
    return (fourth * 24.0f > energy * energy) | (loss < energy * 0.5f) | (loss > energy * 4.0f);
}

/* Fits of n blocks of 256 weights: d, dmin, lost [n], scale, minimum [groups, n], codes [n, 256],
 * lucky [n]: one where ggml's own search may do better. importance: [row_blocks, 256] or NULL, for
 * block after block over and over. d that is not finite: the caller's to refuse. */
EXPORT void i4q_fit_blocks(const float *weights, const float *importance, int64_t n, int64_t row_blocks,
                    const Form *form, float *d, float *dmin, float *scale, float *minimum,
                    int8_t *codes, float *lost, uint8_t *lucky) {
    const int size = form->group, groups = BLOCK / size;
    for (int64_t first = 0; first < n; first += LANES) {
        V x[BLOCK], w[BLOCK], code[BLOCK];
        const int count = n - first < LANES ? (int)(n - first) : LANES;
        for (int l = 0; l < LANES; l++) { /* a last tile repeats its first block */
            const int64_t block = first + (l < count ? l : 0);
            const float *own = weights + block * BLOCK;
            for (int i = 0; i < BLOCK; i++) ((float *)&x[i])[l] = own[i];
            if (!importance) continue;
            const float *each = importance + block % row_blocks * BLOCK;
            for (int i = 0; i < BLOCK; i++) ((float *)&w[i])[l] = each[i];
        }
        Fit fit;
        fit_block(x, importance ? w : 0, form, &fit);
        V total = all(0);
        for (int g = 0; g < groups; g++) {
            best_codes(x + g * size, &fit, g, form, code + g * size);
            V error = group_error(x + g * size, 0, &fit, g, form, code + g * size);
            total = g ? total + error : error;
        }
        M luck = worth_trying(x, total, form);
        for (int l = 0; l < count; l++) {
            const int64_t block = first + l;
            for (int i = 0; i < BLOCK; i++)
                codes[block * BLOCK + i] = (int8_t)((const float *)&code[i])[l];
            d[block] = fit.d[l];
            dmin[block] = fit.dmin[l];
            lost[block] = total[l];
            lucky[block] = luck[l] != 0;
            for (int g = 0; g < groups; g++) {
                scale[g * n + block] = fit.scale[g][l];
                minimum[g * n + block] = fit.minimum[g][l];
            }
        }
    }
}
