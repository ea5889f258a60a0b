// Registers the operators with the LibTorch that is loaded in the process, through its C shim and
// without its headers: one binary for every torch >= 2.9.
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "common.h"

namespace diffforce {
namespace {

using Handle = void*;           // AtenTensorHandle
using StableIValue = uint64_t;  // as LibTorch's C shim passes arguments: handles are owned
using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

/// The functions of LibTorch that are used; all return 0 on success.
struct Shim {
    int32_t (*library_init_fragment)(const char*, const char*, uint32_t, void**);
    int32_t (*library_init_impl)(const char*, const char*, const char*, uint32_t, void**);
    int32_t (*library_def)(void*, const char*);
    int32_t (*library_impl)(void*, const char*, Kernel);
    int32_t (*delete_library_object)(void*);
    int32_t (*delete_tensor_object)(Handle);
    int32_t (*get_data_ptr)(Handle, void**);
    int32_t (*get_dim)(Handle, int64_t*);
    int32_t (*get_sizes)(Handle, int64_t**);
    int32_t (*get_strides)(Handle, int64_t**);
    int32_t (*get_dtype)(Handle, int32_t*);
    int32_t (*get_device_type)(Handle, int32_t*);
    int32_t (*get_device_index)(Handle, int32_t*);
    int32_t (*is_contiguous)(Handle, bool*);
    int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t,
                             Handle*);
    int32_t (*dtype_float32)();
    int32_t (*dtype_float64)();
    int32_t (*dtype_int64)();
    int32_t (*device_type_cpu)();
    // Only with CUDA:
    int32_t (*get_current_cuda_stream)(int32_t, void**);
    int32_t (*create_cuda_guard)(int32_t, void**);
    int32_t (*delete_cuda_guard)(void*);

    int32_t float32, float64, int64, cpu;
};
Shim shim;

void call(int32_t code, const char* what) {
    if (code != 0) throw std::runtime_error(std::string("diffforce: LibTorch failed to ") + what);
}

template <typename Function>
bool find(void* library, const char* name, Function& out) {
    void* address = dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
    std::memcpy(&out, &address, sizeof address);
    return address != nullptr;
}

void* open_loaded(const char* linux_name, const char* mac_name) {
    void* library = dlopen(linux_name, RTLD_LAZY | RTLD_NOLOAD);
    return library != nullptr ? library : dlopen(mac_name, RTLD_LAZY | RTLD_NOLOAD);
}

void find_shim() {
    void* library = open_loaded("libtorch_cpu.so", "libtorch_cpu.dylib");
    const char* missing = nullptr;
#define DIFFFORCE_FIND(name) \
    if (!find(library, "aoti_torch_" #name, shim.name)) missing = "aoti_torch_" #name
    DIFFFORCE_FIND(library_init_fragment);
    DIFFFORCE_FIND(library_init_impl);
    DIFFFORCE_FIND(library_def);
    DIFFFORCE_FIND(library_impl);
    DIFFFORCE_FIND(delete_library_object);
    DIFFFORCE_FIND(delete_tensor_object);
    DIFFFORCE_FIND(get_data_ptr);
    DIFFFORCE_FIND(get_dim);
    DIFFFORCE_FIND(get_sizes);
    DIFFFORCE_FIND(get_strides);
    DIFFFORCE_FIND(get_dtype);
    DIFFFORCE_FIND(get_device_type);
    DIFFFORCE_FIND(get_device_index);
    DIFFFORCE_FIND(is_contiguous);
    DIFFFORCE_FIND(empty_strided);
    DIFFFORCE_FIND(dtype_float32);
    DIFFFORCE_FIND(dtype_float64);
    DIFFFORCE_FIND(dtype_int64);
    DIFFFORCE_FIND(device_type_cpu);
    if (missing != nullptr)
        fail(DIFFFORCE_NO_TORCH,
             "expected a loaded LibTorch (import torch, >= 2.9, first) with the "
             "symbol %s, found none",
             missing);
    void* cuda = open_loaded("libtorch_cuda.so", "libtorch_cuda.dylib");
    if (cuda != nullptr) {
        const char* unused = nullptr;
        library = cuda;
        DIFFFORCE_FIND(get_current_cuda_stream);
        DIFFFORCE_FIND(create_cuda_guard);
        DIFFFORCE_FIND(delete_cuda_guard);
        (void)unused;
        if (missing != nullptr) shim.get_current_cuda_stream = nullptr;
    }
#undef DIFFFORCE_FIND
    shim.float32 = shim.dtype_float32();
    shim.float64 = shim.dtype_float64();
    shim.int64 = shim.dtype_int64();
    shim.cpu = shim.device_type_cpu();
}

/// Owns one tensor handle.
class Tensor {
  public:
    Tensor() = default;
    explicit Tensor(Handle handle) : handle_(handle) {}
    Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Tensor() {
        if (handle_ != nullptr) shim.delete_tensor_object(handle_);
    }
    Handle get() const { return handle_; }
    Handle release() {
        Handle handle = handle_;
        handle_ = nullptr;
        return handle;
    }

  private:
    Handle handle_ = nullptr;
};

/// Arguments of one call. Takes ownership of the handles at once, so that an error leaks nothing.
class Call {
  public:
    Call(const char* op, StableIValue* stack, int n_tensors) : op_(op), stack_(stack) {
        tensors_.reserve(n_tensors);
    }
    void own(int slot) {
        Handle handle;
        std::memcpy(&handle, &stack_[slot], sizeof handle);
        tensors_.emplace_back(handle);
    }

    [[noreturn]] void wrong(const char* name, const std::string& expected,
                            const std::string& found) const {
        throw std::runtime_error(std::string("diffforce::") + op_ + ": " + name + ": expected " +
                                 expected + ", found " + found);
    }
    void status(int status) const {
        if (status != DIFFFORCE_OK)
            throw std::runtime_error(std::string("diffforce::") + op_ + ": " +
                                     diffforce_last_error());
    }

    /// dtype and device of the first tensor set those of all others.
    void lead(const char* name) {
        Handle x = tensors_[0].get();
        call(shim.get_dtype(x, &dtype_), "read a dtype");
        call(shim.get_device_type(x, &device_type_), "read a device");
        call(shim.get_device_index(x, &device_index_), "read a device");
        if (dtype_ != shim.float32 && dtype_ != shim.float64)
            wrong(name, "dtype float32 or float64", "another dtype");
    }
    diffforce_dtype dtype() const {
        return dtype_ == shim.float32 ? DIFFFORCE_FLOAT32 : DIFFFORCE_FLOAT64;
    }
    bool on_cpu() const { return device_type_ == shim.cpu; }
    int32_t device_index() const { return device_index_; }

    int64_t size(int k, int axis) const {
        int64_t* sizes;
        call(shim.get_sizes(tensors_[k].get(), &sizes), "read a shape");
        return sizes[axis];
    }
    int64_t dim(int k) const {
        int64_t dim;
        call(shim.get_dim(tensors_[k].get(), &dim), "read a shape");
        return dim;
    }
    int64_t count(int k) const {
        int64_t n = 1;
        for (int64_t axis = 0; axis < dim(k); ++axis) n *= size(k, static_cast<int>(axis));
        return n;
    }

    /// Data of tensor k after checking its type, device and shape (-1: any size).
    const void* data(int k, const char* name, bool integer, std::initializer_list<int64_t> shape) {
        Handle t = tensors_[k].get();
        int32_t dtype, device_type, device_index;
        call(shim.get_dtype(t, &dtype), "read a dtype");
        call(shim.get_device_type(t, &device_type), "read a device");
        call(shim.get_device_index(t, &device_index), "read a device");
        if (integer ? dtype != shim.int64 : dtype != dtype_)
            wrong(name,
                  integer ? "dtype int64"
                          : std::string("the dtype of x, ") +
                                (dtype_ == shim.float32 ? "float32" : "float64"),
                  dtype == shim.float32   ? "float32"
                  : dtype == shim.float64 ? "float64"
                  : dtype == shim.int64   ? "int64"
                                          : "another dtype");
        if (device_type != device_type_ || device_index != device_index_)
            wrong(name, "the device of x", "another device");
        bool fits = dim(k) == static_cast<int64_t>(shape.size());
        int axis = 0;
        for (const int64_t n : shape) {
            fits = fits && (n < 0 || size(k, axis) == n);
            ++axis;
        }
        if (!fits) {
            std::string expected = "shape [", found = "[";
            for (const int64_t n : shape)
                expected += (n < 0 ? std::string("*") : std::to_string(n)) + ", ";
            for (int64_t i = 0; i < dim(k); ++i)
                found += std::to_string(size(k, static_cast<int>(i))) + ", ";
            for (std::string* text : {&expected, &found}) {
                if (text->size() > 2 && text->compare(text->size() - 2, 2, ", ") == 0)
                    text->resize(text->size() - 2);
                *text += "]";
            }
            wrong(name, expected, found);
        }
        void* data;
        call(shim.get_data_ptr(t, &data), "read a tensor");
        bool contiguous;
        call(shim.is_contiguous(t, &contiguous), "read a layout");
        if (contiguous) return data;
        if (!on_cpu()) wrong(name, "a contiguous tensor on this device", "a strided one");
        return copy_dense(k, static_cast<const char*>(data), dtype == shim.float32 ? 4 : 8);
    }

    Tensor empty(std::initializer_list<int64_t> shape, int32_t dtype) const {
        int64_t sizes[3], strides[3], n = static_cast<int64_t>(shape.size());
        std::copy(shape.begin(), shape.end(), sizes);
        int64_t stride = 1;
        for (int64_t k = n - 1; k >= 0; --k) {
            strides[k] = stride;
            stride *= std::max<int64_t>(sizes[k], 1);
        }
        Handle out;
        call(shim.empty_strided(n, sizes, strides, dtype, device_type_, device_index_, &out),
             "allocate a tensor");
        return Tensor(out);
    }
    Tensor empty(std::initializer_list<int64_t> shape) const { return empty(shape, dtype_); }

    template <typename Value>
    Value scalar(int slot) const {
        Value value;
        std::memcpy(&value, &stack_[slot], sizeof value);
        return value;
    }
    void give(int slot, Tensor& tensor) {
        Handle handle = tensor.release();
        stack_[slot] = 0;
        std::memcpy(&stack_[slot], &handle, sizeof handle);
    }

  private:
    const void* copy_dense(int k, const char* from, size_t width) {
        int64_t *sizes, *strides;
        call(shim.get_sizes(tensors_[k].get(), &sizes), "read a shape");
        call(shim.get_strides(tensors_[k].get(), &strides), "read strides");
        const int64_t n_dim = dim(k), n = count(k);
        copies_.emplace_back(static_cast<size_t>(n) * width / 8 + 1);
        char* to = reinterpret_cast<char*>(copies_.back().data());
        for (int64_t i = 0; i < n; ++i) {
            int64_t rest = i, offset = 0;
            for (int64_t axis = n_dim - 1; axis >= 0; --axis) {
                offset += rest % sizes[axis] * strides[axis];
                rest /= sizes[axis];
            }
            std::memcpy(to + i * width, from + offset * static_cast<int64_t>(width), width);
        }
        return to;
    }

    const char* op_;
    StableIValue* stack_;
    std::vector<Tensor> tensors_;
    std::vector<std::vector<double>> copies_;
    int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

void* pointer(const Tensor& tensor) {
    void* data;
    call(shim.get_data_ptr(tensor.get(), &data), "read a tensor");
    return data;
}

// ---------------------------------------------------------------- pair operator

#define DIFFFORCE_PAIR_ARGS                                                                 \
    "Tensor x, Tensor sigma, Tensor lam, Tensor box, Tensor sites, Tensor env, "            \
    "Tensor pair_type, Tensor table, Tensor r_grid, Tensor lam_knots, Tensor sigma_knots, " \
    "float r_switch, float r_cutoff, bool integrated"

struct PairInputs {
    diffforce_pair_problem problem;
    const void *x, *sigma, *lam, *box;
};

PairInputs pair_inputs(Call& call) {
    call.lead("x");
    PairInputs in{};
    diffforce_pair_problem& p = in.problem;
    in.x = call.data(0, "x", false, {-1, -1, 3});
    p.n_frames = call.size(0, 0);
    p.n_atoms = call.size(0, 1);
    in.sigma = call.data(1, "sigma", false, {p.n_frames});
    in.lam = call.data(2, "lam", false, {p.n_frames});
    if (call.dim(3) == 1 && call.size(3, 0) == 0)
        in.box = nullptr;
    else
        in.box = call.data(3, "box", false, {p.n_frames, 3, 3});
    p.sites = static_cast<const int64_t*>(call.data(4, "sites", true, {-1}));
    p.env = static_cast<const int64_t*>(call.data(5, "env", true, {-1}));
    p.n_sites = call.size(4, 0);
    p.n_env = call.size(5, 0);
    p.pair_type =
        static_cast<const int64_t*>(call.data(6, "pair_type", true, {p.n_sites, p.n_env}));
    p.table = call.data(7, "table", false, {-1, -1, -1, -1});
    p.n_types = call.size(7, 0);
    p.n_lam = call.size(7, 1);
    p.n_noise = call.size(7, 2);
    p.n_coef = call.size(7, 3);
    p.r_grid = call.data(8, "r_grid", false, {p.n_types, 2});
    p.lam_knots = call.data(9, "lam_knots", false, {p.n_lam});
    p.sigma_knots = call.data(10, "sigma_knots", false, {p.n_noise});
    p.r_switch = call.scalar<double>(11);
    p.r_cutoff = call.scalar<double>(12);
    p.integrated = call.scalar<bool>(13) ? 1 : 0;
    p.dtype = call.dtype();
    return in;
}

void pair_operator_cpu(StableIValue* stack, uint64_t, uint64_t) {
    Call call("pair_operator", stack, 11);
    for (int slot = 0; slot < 11; ++slot) call.own(slot);
    const PairInputs in = pair_inputs(call);
    const int64_t n = in.problem.n_frames;
    Tensor value = call.empty({n}), grad = call.empty({n, in.problem.n_atoms, 3});
    Tensor d_sigma = call.empty({n}), d_lam = call.empty({n});
    call.status(diffforce_pair_operator(&in.problem, in.x, in.sigma, in.lam, in.box, pointer(value),
                                        pointer(grad), pointer(d_sigma), pointer(d_lam)));
    call.give(0, value);
    call.give(1, grad);
    call.give(2, d_sigma);
    call.give(3, d_lam);
}

void pair_operator_cuda(StableIValue* stack, uint64_t, uint64_t) {
    Call call("pair_operator", stack, 11);
    for (int slot = 0; slot < 11; ++slot) call.own(slot);
    const PairInputs in = pair_inputs(call);
    const int64_t n = in.problem.n_frames;
    void *guard = nullptr, *stream = nullptr;
    diffforce::call(shim.create_cuda_guard(call.device_index(), &guard), "choose a CUDA device");
    const std::unique_ptr<void, int32_t (*)(void*)> keep(guard, shim.delete_cuda_guard);
    diffforce::call(shim.get_current_cuda_stream(call.device_index(), &stream), "find the stream");
    Tensor value = call.empty({n}), grad = call.empty({n, in.problem.n_atoms, 3});
    Tensor d_sigma = call.empty({n}), d_lam = call.empty({n});
    call.status(diffforce_pair_operator_cuda(&in.problem, in.x, in.sigma, in.lam, in.box,
                                             pointer(value), pointer(grad), pointer(d_sigma),
                                             pointer(d_lam), stream));
    call.give(0, value);
    call.give(1, grad);
    call.give(2, d_sigma);
    call.give(3, d_lam);
}

void pair_operator_hvp_cpu(StableIValue* stack, uint64_t, uint64_t) {
    Call call("pair_operator_hvp", stack, 14);
    for (int slot = 0; slot < 11; ++slot) call.own(slot);
    for (int slot = 14; slot < 17; ++slot) call.own(slot);
    const PairInputs in = pair_inputs(call);
    const int64_t n = in.problem.n_frames, n_atoms = in.problem.n_atoms;
    const void* v_x = call.data(11, "v_x", false, {n, n_atoms, 3});
    const void* v_sigma = call.data(12, "v_sigma", false, {n});
    const void* v_lam = call.data(13, "v_lam", false, {n});
    Tensor h_x = call.empty({n, n_atoms, 3}), h_sigma = call.empty({n}), h_lam = call.empty({n});
    call.status(diffforce_pair_operator_hvp(&in.problem, in.x, in.sigma, in.lam, in.box, v_x,
                                            v_sigma, v_lam, pointer(h_x), pointer(h_sigma),
                                            pointer(h_lam)));
    call.give(0, h_x);
    call.give(1, h_sigma);
    call.give(2, h_lam);
}

// ---------------------------------------------------------------- internal coordinates

#define DIFFFORCE_INTERNAL_ARGS                                                    \
    "Tensor x, Tensor sigma, Tensor atoms, Tensor cls, Tensor kind, Tensor grid, " \
    "Tensor offsets, Tensor coef, Tensor sigma_knots"

struct InternalInputs {
    diffforce_internal_problem problem;
    const void *x, *second;
};

/// Shared by the action (second = sigma) and the normal equations (second = target).
InternalInputs internal_inputs(Call& call, bool normal) {
    call.lead("x");
    InternalInputs in{};
    diffforce_internal_problem& p = in.problem;
    in.x = call.data(0, "x", false, {-1, -1, 3});
    p.n_frames = call.size(0, 0);
    p.n_atoms = call.size(0, 1);
    if (normal)
        in.second = call.data(1, "target", false, {p.n_frames, p.n_atoms, 3});
    else
        in.second = call.data(1, "sigma", false, {p.n_frames});
    p.atoms = static_cast<const int64_t*>(call.data(2, "atoms", true, {-1, 4}));
    p.n_instances = call.size(2, 0);
    p.cls = static_cast<const int64_t*>(call.data(3, "cls", true, {p.n_instances}));
    p.kind = static_cast<const int64_t*>(call.data(4, "kind", true, {-1}));
    p.n_classes = call.size(4, 0);
    p.offsets = static_cast<const int64_t*>(call.data(6, "offsets", true, {p.n_classes + 1}));
    if (normal) {
        p.n_noise = 1;
        p.grid = call.data(5, "grid", false, {p.n_classes, 3});
    } else {
        p.sigma_knots = call.data(8, "sigma_knots", false, {-1});
        p.n_noise = call.size(8, 0);
        p.grid = call.data(5, "grid", false, {p.n_noise, p.n_classes, 3});
        if (!call.on_cpu()) call.wrong("x", "a tensor on the CPU", "another device");
        p.coef = call.data(7, "coef", false, {p.n_noise, p.offsets[p.n_classes]});
    }
    p.dtype = call.dtype();
    return in;
}

void internal_action_cpu(StableIValue* stack, uint64_t, uint64_t) {
    Call call("internal_action", stack, 9);
    for (int slot = 0; slot < 9; ++slot) call.own(slot);
    const InternalInputs in = internal_inputs(call, false);
    const int64_t n = in.problem.n_frames;
    Tensor value = call.empty({n}), grad = call.empty({n, in.problem.n_atoms, 3});
    Tensor d_sigma = call.empty({n});
    call.status(diffforce_internal_action(&in.problem, in.x, in.second, pointer(value),
                                          pointer(grad), pointer(d_sigma)));
    call.give(0, value);
    call.give(1, grad);
    call.give(2, d_sigma);
}

void internal_action_hvp_cpu(StableIValue* stack, uint64_t, uint64_t) {
    Call call("internal_action_hvp", stack, 11);
    for (int slot = 0; slot < 11; ++slot) call.own(slot);
    const InternalInputs in = internal_inputs(call, false);
    const int64_t n = in.problem.n_frames, n_atoms = in.problem.n_atoms;
    const void* v_x = call.data(9, "v_x", false, {n, n_atoms, 3});
    const void* v_sigma = call.data(10, "v_sigma", false, {n});
    Tensor h_x = call.empty({n, n_atoms, 3}), h_sigma = call.empty({n});
    call.status(diffforce_internal_action_hvp(&in.problem, in.x, in.second, v_x, v_sigma,
                                              pointer(h_x), pointer(h_sigma)));
    call.give(0, h_x);
    call.give(1, h_sigma);
}

void internal_normal_cpu(StableIValue* stack, uint64_t, uint64_t) {
    Call call("internal_normal", stack, 7);
    for (int slot = 0; slot < 7; ++slot) call.own(slot);
    const InternalInputs in = internal_inputs(call, true);
    if (in.problem.dtype != DIFFFORCE_FLOAT64) call.wrong("x", "dtype float64", "float32");
    const int64_t n_threads = call.scalar<int64_t>(7);
    const int64_t k = in.problem.offsets[in.problem.n_classes];
    if (k < 0 || k > (int64_t{1} << 20))
        call.wrong("offsets", "a number of coefficients in [0, 2^20]", std::to_string(k));
    if (n_threads < 0 || n_threads > 4096)
        call.wrong("n_threads", "a number in [0, 4096]", std::to_string(n_threads));
    Tensor a = call.empty({k, k}), b = call.empty({k}), lap = call.empty({k});
    call.status(diffforce_internal_normal(
        &in.problem, static_cast<const double*>(in.x), static_cast<const double*>(in.second),
        static_cast<int>(n_threads), static_cast<double*>(pointer(a)),
        static_cast<double*>(pointer(b)), static_cast<double*>(pointer(lap))));
    call.give(0, a);
    call.give(1, b);
    call.give(2, lap);
}

// ---------------------------------------------------------------- registration

struct Operator {
    const char *name, *schema;
    Kernel cpu, cuda;
};

const Operator operators[] = {
    {"pair_operator",
     "pair_operator(" DIFFFORCE_PAIR_ARGS
     ") -> (Tensor value, Tensor grad_x, Tensor d_sigma, Tensor d_lam)",
     pair_operator_cpu, pair_operator_cuda},
    {"pair_operator_hvp",
     "pair_operator_hvp(" DIFFFORCE_PAIR_ARGS
     ", Tensor v_x, Tensor v_sigma, Tensor v_lam) -> (Tensor h_x, Tensor h_sigma, Tensor h_lam)",
     pair_operator_hvp_cpu, nullptr},
    {"internal_action",
     "internal_action(" DIFFFORCE_INTERNAL_ARGS
     ") -> (Tensor value, Tensor grad_x, Tensor d_sigma)",
     internal_action_cpu, nullptr},
    {"internal_action_hvp",
     "internal_action_hvp(" DIFFFORCE_INTERNAL_ARGS
     ", Tensor v_x, Tensor v_sigma) -> (Tensor h_x, Tensor h_sigma)",
     internal_action_hvp_cpu, nullptr},
    {"internal_normal",
     "internal_normal(Tensor x, Tensor target, Tensor atoms, Tensor cls, Tensor kind, Tensor grid, "
     "Tensor offsets, int n_threads=0) -> (Tensor a, Tensor b, Tensor lap)",
     internal_normal_cpu, nullptr},
};

void check_registration(int32_t code, const char* what) {
    if (code != 0)
        fail(DIFFFORCE_NO_TORCH, "LibTorch refused %s (are two copies of libdiffforce loaded?)",
             what);
}

void register_operators() {
    find_shim();
    // The library objects live as long as the process: deleting them takes the operators away.
    void* library = nullptr;
    check_registration(shim.library_init_fragment("diffforce", "diffforce", __LINE__, &library),
                       "the namespace");
    for (const Operator& op : operators)
        check_registration(shim.library_def(library, op.schema), op.name);
    void* cpu = nullptr;
    check_registration(shim.library_init_impl("diffforce", "CPU", "diffforce", __LINE__, &cpu),
                       "the CPU key");
    for (const Operator& op : operators)
        check_registration(shim.library_impl(cpu, op.name, op.cpu), op.name);
    if (diffforce_has_cuda() == 0 || shim.get_current_cuda_stream == nullptr) return;
    void* cuda = nullptr;
    check_registration(shim.library_init_impl("diffforce", "CUDA", "diffforce", __LINE__, &cuda),
                       "the CUDA key");
    for (const Operator& op : operators)
        if (op.cuda != nullptr)
            check_registration(shim.library_impl(cuda, op.name, op.cuda), op.name);
}

}  // namespace
}  // namespace diffforce

extern "C" int diffforce_torch_register(void) {
    static std::mutex guard;
    static bool done = false;
    return diffforce::guarded([] {
        const std::lock_guard<std::mutex> lock(guard);
        if (done) return;
        diffforce::register_operators();
        done = true;
    });
}
