// Marks functions that host and device code share; expands to nothing under a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define TOKENPRUNE_HD __host__ __device__ __forceinline__
#else
#define TOKENPRUNE_HD inline
#endif
