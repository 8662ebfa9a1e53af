// SPDX-License-Identifier: Apache-2.0
// Prototype: one pass over rows of logits, each row resident in shared memory of a CTA cluster.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>

namespace {
using u32 = uint32_t;
using u64 = uint64_t;
constexpr float kLog2e = 1.44269504088896340736f;

__device__ __forceinline__ u32 smem(const void* p) { return u32(__cvta_generic_to_shared(p)); }
__device__ __forceinline__ void mbar_init(u32 b, u32 n) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(n));
}
__device__ __forceinline__ void mbar_expect(u32 b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void mbar_arrive(u32 b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory");
}
__device__ __forceinline__ void mbar_wait(u32 b, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nW%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra "
      "D%=;\nbra W%=;\nD%=:\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void mbar_wait_cluster(u32 b, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nW%=: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], "
      "%1;\n@p bra D%=;\nbra W%=;\nD%=:\n}" ::"r"(b),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void bulk(u32 dst, const void* src, u32 bytes, u32 bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(dst),
      "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}
__device__ __forceinline__ u32 mapa(u32 a, u32 rank) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(rank));
  return r;
}
__device__ __forceinline__ void send(u32 remote, float x, float y, u32 bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(
          remote),
      "r"(__float_as_uint(x)), "r"(__float_as_uint(y)), "r"(bar)
      : "memory");
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 max2(u32 a, u32 b) {
  u32 r;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ float lo(u32 w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float hi(u32 w) { return __uint_as_float(w & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
__device__ __forceinline__ u32 ctarank() {
  u32 r;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ u32 clusterid() {
  u32 r;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(r));
  return r;
}
__device__ __forceinline__ u32 nclusters() {
  u32 r;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
__device__ __forceinline__ void online(float& m, float& s, float m2, float s2) {  // merge (m2,s2)
  float n = fmaxf(m, m2);
  float base = n == -INFINITY ? 0.f : n;
  s = s * ex2(m - base) + s2 * ex2(m2 - base);
  m = n;
}
}  // namespace

struct Args {
  uint16_t* z;
  const int64_t* a;
  const float *v, *ref, *g;
  float *logp, *resid, *dv;
  int64_t n, width, pitch;
  float tau, inv_norm;
  int chunks, vecs, chunk_vecs;  // per CTA: chunks a row, vectors a row, vectors a chunk
};

template <int NC, int U, int STAGES, int CLUSTER, bool GRAD>
__global__ void __launch_bounds__(NC + 32) ring(const Args p) {
  constexpr int CH = NC * U;  // vectors a chunk slot
  constexpr int WARPS = NC / 32, PAIRS = WARPS * CLUSTER;
  extern __shared__ __align__(128) uint4 buf[];
  __shared__ __align__(8) u64 full[STAGES], empty[STAGES], xbar[2];
  __shared__ __align__(8) float2 slots[2][PAIRS];
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  const u32 rank = CLUSTER > 1 ? ctarank() : 0;
  const int64_t cid = CLUSTER > 1 ? clusterid() : blockIdx.x,
                nc = CLUSTER > 1 ? nclusters() : gridDim.x;
  if (tid == 0) {
    for (int i = 0; i < STAGES; ++i) {
      mbar_init(smem(&full[i]), 1);
      mbar_init(smem(&empty[i]), WARPS);
    }
    for (int i = 0; i < 2; ++i) mbar_init(smem(&xbar[i]), CLUSTER > 1 ? 1 : WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (CLUSTER > 1)
    cluster_sync();
  else
    __syncthreads();
  const int64_t first_vec = int64_t(rank) * p.vecs;
  const int total_vecs = int(p.width / 8);
  const int my_vecs = min(p.vecs, total_vecs - int(first_vec));

  if (warp == WARPS) {  // producer
    if (lane == 0) {
      int st = 0;
      u32 ph = 1;
      for (int64_t r = cid; r < p.n; r += nc) {
        const uint4* row = reinterpret_cast<const uint4*>(p.z + r * p.pitch) + first_vec;
        for (int c = 0, v0 = 0; c < p.chunks; ++c, v0 += p.chunk_vecs) {
          const u32 bytes = 16 * max(0, min(p.chunk_vecs, my_vecs - v0));
          mbar_wait(smem(&empty[st]), ph);
          mbar_expect(smem(&full[st]), bytes);
          if (bytes) bulk(smem(buf + st * CH), row + v0, bytes, smem(&full[st]));
          if (++st == STAGES) st = 0, ph ^= 1;
        }
      }
    }
  } else {
    int st = 0;
    u32 ph = 0;
    u32 xph = 0;
    int par = 0;
    for (int64_t r = cid; r < p.n; r += nc) {
      const int64_t action = p.a[r];
      uint16_t* row = p.z + r * p.pitch;
      const float za = __uint_as_float(u32(row[action]) << 16);
      const float v = p.v[r], ref = p.ref[r], g = p.g[r];
      const int tv = int(action / 8 - first_vec), tj = int(action % 8);
      if (CLUSTER > 1 && tid == 0) mbar_expect(smem(&xbar[par]), 8 * PAIRS);
      float m = -INFINITY, s = 0;
      const int st0 = st;
      for (int c = 0, v0 = 0; c < p.chunks; ++c, v0 += p.chunk_vecs) {
        mbar_wait(smem(&full[st]), ph);
        const int n = min(p.chunk_vecs, my_vecs - v0);
        uint4 w[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int i = tid + u * NC;
          w[u] = i < n ? buf[st * CH + i]
                       : make_uint4(0xff80ff80u, 0xff80ff80u, 0xff80ff80u, 0xff80ff80u);
          if (v0 + i == tv) {
            auto drop = [&](u32 x, int k) {
              return k != tj / 2 ? x
                     : tj & 1    ? (x & 0xffffu) | 0xff800000u
                                 : (x & 0xffff0000u) | 0xff80u;
            };
            w[u] = make_uint4(drop(w[u].x, 0), drop(w[u].y, 1), drop(w[u].z, 2), drop(w[u].w, 3));
          }
        }
        u32 mx = 0xff80ff80u;
#pragma unroll
        for (int u = 0; u < U; ++u) mx = max2(mx, max2(max2(w[u].x, w[u].y), max2(w[u].z, w[u].w)));
        const float top = fmaxf(lo(mx), hi(mx)) * kLog2e;
        if (top > m) {
          s *= ex2(m - top);
          m = top;
        }
        const float base = m == -INFINITY ? 0.f : m;
        float s0 = 0, s1 = 0;
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const u32 q[4] = {w[u].x, w[u].y, w[u].z, w[u].w};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            s0 += ex2(fmaf(lo(q[k]), kLog2e, -base));
            s1 += ex2(fmaf(hi(q[k]), kLog2e, -base));
          }
        }
        s += s0 + s1;
        if (!GRAD) {
          __syncwarp();
          if (lane == 0) mbar_arrive(smem(&empty[st]));
        }
        if (++st == STAGES) st = 0, ph ^= 1;
      }
      // merge over the warp, then send one pair a warp to every CTA of the cluster
      const float ta = za * kLog2e;
      float wm = fmaxf(m, ta);
#pragma unroll
      for (int o = 16; o; o /= 2) wm = fmaxf(wm, __shfl_xor_sync(~0u, wm, o));
      s *= m == -INFINITY ? 0.f : ex2(m - wm);
#pragma unroll
      for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
      if (lane < CLUSTER) {
        const u32 slot = smem(&slots[par][rank * WARPS + warp]), bar = smem(&xbar[par]);
        if (CLUSTER > 1)
          send(mapa(slot, lane), wm, s, mapa(bar, lane));
        else {
          slots[par][warp] = make_float2(wm, s);
          mbar_arrive(bar);
        }
      }
      mbar_wait_cluster(smem(&xbar[par]), xph);
      float M = -INFINITY, S = 0;
#pragma unroll
      for (int b = 0; b < PAIRS; b += 32) {
        const float2 q = b + lane < PAIRS ? slots[par][b + lane] : make_float2(-INFINITY, 0.f);
        const float nm = fmaxf(M, q.x);
        S = S * (M == -INFINITY ? 0.f : ex2(M - nm)) +
            q.y * (q.x == -INFINITY ? 0.f : ex2(q.x - nm));
        M = nm;
      }
      float t = M;
#pragma unroll
      for (int o = 16; o; o /= 2) t = fmaxf(t, __shfl_xor_sync(~0u, t, o));
      S *= M == -INFINITY ? 0.f : ex2(M - t);
      M = t;
#pragma unroll
      for (int o = 16; o; o /= 2) S += __shfl_xor_sync(~0u, S, o);
      par ^= 1;
      if (!par) xph ^= 1;
      const float ea = ex2(ta - M), rest = S, sum = S + ea;
      const float logp = ta == M ? -log1pf(rest) : (ta - M) * 0.693147180559945f - logf(sum);
      const float res = p.tau * (logp - ref) + v - g;
      const float dq = 2.f * res * p.inv_norm;
      if (rank == 0 && tid == 0) {
        p.logp[r] = logp;
        p.resid[r] = res;
        p.dv[r] = dq;
      }
      if (GRAD) {
        const float coef = p.tau * dq, k = -coef / sum, da = coef * (rest / sum);
        st = st0;
        for (int c = 0, v0 = 0; c < p.chunks; ++c, v0 += p.chunk_vecs) {
          const int n = min(p.chunk_vecs, my_vecs - v0);
          uint4 w[U];
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const int i = tid + u * NC;
            if (i < n) w[u] = buf[st * CH + i];
          }
          __syncwarp();
          if (lane == 0) mbar_arrive(smem(&empty[st]));
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const int i = tid + u * NC;
            if (i >= n) continue;
            const u32 q[4] = {w[u].x, w[u].y, w[u].z, w[u].w};
            u32 o[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float a = k * ex2(fmaf(lo(q[j]), kLog2e, -M)),
                    b = k * ex2(fmaf(hi(q[j]), kLog2e, -M));
              if (v0 + i == tv && j == tj / 2) {
                if (tj & 1)
                  b = da;
                else
                  a = da;
              }
              o[j] = pack(a, b);
            }
            __stcs(reinterpret_cast<uint4*>(row) + first_vec + v0 + i,
                   make_uint4(o[0], o[1], o[2], o[3]));
          }
          if (++st == STAGES) st = 0;
        }
      }
    }
  }
  if (CLUSTER > 1) cluster_sync();
}

template <int NC, int U, int STAGES, int CLUSTER, bool GRAD>
int launch(Args p, int ctas_per_sm, cudaStream_t stream) {
  constexpr int CH = NC * U;
  const int vecs = int(p.width / 8);
  p.vecs = (vecs + CLUSTER - 1) / CLUSTER;
  p.chunks = (p.vecs + CH - 1) / CH;
  p.chunk_vecs = (p.vecs + p.chunks - 1) / p.chunks;
  if (GRAD && p.chunks > STAGES) return -1;
  auto k = ring<NC, U, STAGES, CLUSTER, GRAD>;
  const int bytes = STAGES * CH * 16;
  cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int sms;
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0);
  cudaLaunchConfig_t cfg{};
  cfg.gridDim = dim3(sms * ctas_per_sm / CLUSTER * CLUSTER);
  cfg.blockDim = dim3(NC + 32);
  cfg.dynamicSmemBytes = bytes;
  cfg.stream = stream;
  cudaLaunchAttribute at[1];
  at[0].id = cudaLaunchAttributeClusterDimension;
  at[0].val.clusterDim.x = CLUSTER;
  at[0].val.clusterDim.y = at[0].val.clusterDim.z = 1;
  cfg.attrs = at;
  cfg.numAttrs = CLUSTER > 1 ? 1 : 0;
  if (CLUSTER > 1) {
    int ncl = 0;
    if (cudaOccupancyMaxActiveClusters(&ncl, k, &cfg) == cudaSuccess && ncl > 0)
      cfg.gridDim.x = ncl * CLUSTER < (int)cfg.gridDim.x ? ncl * CLUSTER : cfg.gridDim.x;
  }
  cudaError_t e = cudaLaunchKernelEx(&cfg, k, p);
  return e ? int(e) : int(cfg.gridDim.x) << 8;
}

extern "C" int run(int variant, int cluster, int grad, void* z, const int64_t* a, const float* v,
                   const float* ref, const float* g, float* logp, float* resid, float* dv,
                   int64_t n, int64_t width, int64_t pitch, float tau, float inv_norm,
                   cudaStream_t stream) {
  Args p{(uint16_t*)z, a, v, ref, g, logp, resid, dv, n, width, pitch, tau, inv_norm, 0, 0, 0};
#define GO(NC, U, ST, PER)                                 \
  if (grad) switch (cluster) {                             \
      case 1:                                              \
        return launch<NC, U, ST, 1, true>(p, PER, stream); \
      case 2:                                              \
        return launch<NC, U, ST, 2, true>(p, PER, stream); \
      case 4:                                              \
        return launch<NC, U, ST, 4, true>(p, PER, stream); \
      case 8:                                              \
        return launch<NC, U, ST, 8, true>(p, PER, stream); \
    }                                                      \
  else                                                     \
    return launch<NC, U, ST, 1, false>(p, PER, stream);
  if (variant == 0) {
    GO(512, 2, 13, 1)
  }
  if (variant == 1) {
    GO(256, 2, 13, 2)
  }
  if (variant == 2) {
    GO(256, 4, 6, 2)
  }
  if (variant == 3) {
    GO(512, 1, 13, 2)
  }
  if (variant == 4) {
    GO(512, 4, 6, 1)
  }
  if (variant == 5) {
    GO(128, 4, 13, 2)
  }
  if (variant == 6) {
    GO(256, 2, 8, 3)
  }
  return -2;
}
